"""The server that everybody would write: take a lock, switch, generate, one request after the other.

python -m benchmarks.speed.serving_rival STORE PORT THREADS
"""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

import paretofuse as pf


class Completion(BaseModel):
    """What the benchmark asks for."""

    prompt: list[int]
    max_tokens: int
    preference: dict[str, float]


def make_app(store: str) -> FastAPI:
    """The app."""
    engine, lock, app = pf.load(store), Lock(), FastAPI()

    @app.post("/v1/completions")
    def complete(body: Completion) -> Any:
        tokens = torch.tensor([body.prompt])
        with lock:
            if engine.preference != body.preference:
                engine.switch(body.preference)
            module: Any = engine.module
            found = module.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=body.max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return {"tokens": found[0, tokens.shape[1] :].tolist()}

    return app


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), log_level="error")
