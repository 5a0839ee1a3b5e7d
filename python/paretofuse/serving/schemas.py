"""What requests and answers look like; the names are OpenAI's, but for `preference`. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from paretofuse.engine.layout import is_text

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[dict[str, float], Field(max_length=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_whole_characters(cls, data: Any) -> Any:
        """Refuse halves of surrogate pairs: JSON can write them (\\ud800), and no tokenizer or answer can hold them."""
        waiting = [data]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str) and not is_text(value):
                raise PydanticCustomError(
                    "no_text", "half of a surrogate pair is no character; send whole ones"
                )
        return data


class Bounds(_Strict):
    """A preference by what its point of the front reaches."""

    at_most: Annotated[dict[Name, Number], Field(max_length=64)] | None = None
    at_least: Annotated[dict[Name, Number], Field(max_length=64)] | None = None
    best: Name | None = None


Preference = Annotated[dict[Name, Share], Field(min_length=1, max_length=256)] | Bounds
"""{"news": 0.7, "poems": 0.3}, or {"at_most": {"news": 30.0}, "best": "poems"}."""


class _Asks(_Strict):
    """What every request has."""

    model: Name | None = None
    preference: Preference | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None


class SetPreference(_Strict):
    """The default for requests that name none."""

    preference: Preference


class StreamOptions(_Strict):
    """OpenAI's."""

    include_usage: bool = False


class Sampling(_Asks):
    """How tokens are chosen, and when to end."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # OpenAI's fields that are not served: clients send them all the same, and may where they change nothing.
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    logprobs: Literal[False] | None = None

    def stops(self) -> tuple[str, ...]:
        """As a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several, as a list."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    def characters(self) -> int:
        """Of all texts."""
        return sum(len(prompt) for prompt in self.prompts() if isinstance(prompt, str))


class TextPart(_Strict):
    """A part of a message's content; OpenAI's clients may send content in parts."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=64)]
    name: Annotated[str, Field(max_length=200)] | None = None

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    def characters(self) -> int:
        """Of all texts."""
        return sum(len(message.text()) for message in self.messages)


class EmbeddingRequest(_Asks):
    """POST /v1/embeddings: texts or their tokens; of image models, images in base64 (PNG, JPEG, ...)."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    head: Name | None = None


class ClassifyRequest(_Asks):
    """POST /v1/classify: as `EmbeddingRequest`."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    head: Name | None = None


class PredictRequest(_Asks):
    """POST /v1/predict: whatever the function takes."""

    input: Any
    head: Name | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class Completion(BaseModel):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    preference: dict[str, float]


class ChatAnswer(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    preference: dict[str, float]


class Embedding(BaseModel):
    """One input's; in base64 the float32 numbers, little endian."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage
    preference: dict[str, float]


class Classification(BaseModel):
    """One input's: the most likely label, its number, and the probability of each label in order."""

    index: int
    label: str
    class_index: int
    probs: list[float]
    num_classes: int


class ClassificationList(BaseModel):
    """The answer of /v1/classify."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage
    preference: dict[str, float]


class Prediction(BaseModel):
    """The answer of /v1/predict."""

    id: str
    object: Literal["prediction"] = "prediction"
    created: int
    model: str
    output: Any
    preference: dict[str, float]


class Model(BaseModel):
    """One line of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "paretofuse"


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class FrontPoint(BaseModel):
    """A preference and what was measured there."""

    preference: dict[str, float]
    values: dict[str, float]


class Metric(BaseModel):
    """Which way is better."""

    maximize: bool


class FrontDocument(BaseModel):
    """The answer of GET /v1/front; without a front there are no points and no metrics.

    `models` are the metrics of single models beside it, such as "base"; `takes` is what the model's input is, `chat`
    and `adapter` whether there are a chat template and an adapter to download, `labels` a classifier's outputs in
    order, `facts` what every merged model is, in words.
    """

    object: Literal["front"] = "front"
    model: str
    task: str
    objectives: list[str]
    metrics: dict[str, Metric]
    default: dict[str, float]
    points: list[FrontPoint]
    models: dict[str, dict[str, float]]
    takes: Literal["text", "image", "json"]
    chat: bool
    adapter: bool
    labels: list[str]
    facts: dict[str, str]


class PreferenceDocument(BaseModel):
    """The answer of PUT /v1/preference."""

    preference: dict[str, float]


class Status(BaseModel):
    """The answer of /healthz and /readyz."""

    status: Literal["ok"] = "ok"
