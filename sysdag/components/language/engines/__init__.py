"""What draws a language model's completions in place of sysdag's own decoder."""
