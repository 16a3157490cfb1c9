"""Language models: text from a prompt, with exact log-probabilities."""
