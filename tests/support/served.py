"""Small stores with tokenizers, and the app over them, for tests of the server."""

from __future__ import annotations

import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paretofuse as pf
from tests.support.models import perturbed, tiny_gpt2

CHARACTERS = string.ascii_letters + string.digits + " .,;:!?'-()"


def character_tokenizer() -> Any:
    """A token for each character; 0 is the end."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1} | {character: i for i, character in enumerate(CHARACTERS, start=2)}
    words |= {f"<{i}>": i for i in range(len(words), 101)}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Split(Regex("."), "isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")


def text_store(path: Path, *, chat: bool = False, size: float = 0.1) -> Path:
    """The store of a tiny GPT-2 with a tokenizer and two experts, "news" and "poems"."""
    base = tiny_gpt2(positions=64)
    tokenizer = character_tokenizer()
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    for name, model in {
        "base": base,
        **{n: perturbed(base, s, size) for s, n in ((1, "news"), (2, "poems"))},
    }.items():
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    pf.stack(path / "base", {"news": path / "news", "poems": path / "poems"}).save(path / "store")
    return path / "store"


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The URL of an app that a thread of this process serves on a free port of loopback."""
    import uvicorn

    from paretofuse.serving.server import listening

    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
