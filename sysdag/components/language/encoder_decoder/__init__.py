"""Encoder-decoders: a source is read as a whole, and a target is written behind the decoder's start token."""
