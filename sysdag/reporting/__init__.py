"""Reports of a training: one HTML file, and the same findings as text and JSON; no model loads for it."""
