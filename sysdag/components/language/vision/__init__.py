"""Vision-language models: images in prompts."""
