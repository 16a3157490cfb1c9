"""Values out of finitely many, and what has no likelihood at all."""
