"""The engine: one base and its experts, ready to become any mixture of them; `engine.py` is its facade."""
