"""`python -m bench study --real`: the paper's experiments on a pretrained language model and real preferences."""
