"""Bundles on inference servers: what writes a Triton model repository, and what runs in it.

What runs on the server (`triton_model` and all that it imports) needs NumPy, Pillow, pydantic and one engine backend.
Only `repository` and `config_text`, which write the repository, need tritonclient.
"""
