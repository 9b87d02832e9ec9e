"""A request to continue prompts, and the client's options for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loraplex_gateway.errors import ApiError
from loraplex_gateway.generation.parameters import PARAMS, SamplingFields, options
from loraplex_gateway.wire.bodies import invalid

DEFAULT_MAX_TOKENS: Final = 16
MAX_LOGPROBS: Final = 20
MAX_PROMPTS: Final = 2048

COMPLETION_PARAMS: Final[Mapping[str, str]] = MappingProxyType(
    {**PARAMS, "prompt_logprobs": "logprobs"}
)
"""Fields of the server's request, and those of the HTTP request that set them."""

_OF_PROMPT: Final = ("token_ids.ids", "token_ids", "input", "prompt")

Prompt = str | list[int]


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt are shown before those of the answer."""
        return bool(self.echo) and self.logprobs is not None


def prompts_of(request: CompletionRequest) -> list[Prompt]:
    """The prompts: one text, several texts, one list of tokens, or several. Raises ApiError."""
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt", "must not be empty")
    if all(isinstance(each, int) for each in given):
        return [_tokens(given, "prompt")]
    if len(given) > MAX_PROMPTS:
        raise invalid("prompt", f"must have at most {MAX_PROMPTS} entries")
    if all(isinstance(each, str) for each in given):
        return [each for each in given if isinstance(each, str)]
    if all(isinstance(each, list) for each in given):
        return [_tokens(each, f"prompt[{i}]") for i, each in enumerate(given)]
    raise _mixed()


def params_of(request: CompletionRequest, index: int) -> dict[str, str]:
    """Fields of the server's request for one of the prompts, and those that set them."""
    given = request.prompt
    if isinstance(given, str) or all(isinstance(each, int) for each in given):
        return {**COMPLETION_PARAMS, "prompt": "prompt"}
    return {**COMPLETION_PARAMS, **dict.fromkeys(_OF_PROMPT, f"prompt[{index}]")}


def _tokens(given: Any, where: str) -> list[int]:
    for i, token in enumerate(given):
        if not 0 <= token < 1 << 32:
            raise invalid(f"{where}[{i}]", "is not the id of a token")
    return list(given)


def _mixed() -> ApiError:
    return invalid("prompt", "must be a text, a list of texts, a list of tokens or several of them")


def completion_options(request: CompletionRequest) -> dict[str, Any]:
    """The client's options, but for the prompt and the model. Raises ApiError (400)."""
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise invalid("logprobs", f"must be between 0 and {MAX_LOGPROBS}")
    if request.max_tokens is not None and request.max_tokens < 0:
        raise invalid("max_tokens", "must be at least 0")
    found = {**options(request), "logprobs": request.logprobs}
    given = request.max_tokens
    found["max_new_tokens"] = DEFAULT_MAX_TOKENS if given is None else given
    if request.scores_prompt:
        found["prompt_logprobs"] = max(request.logprobs or 0, request.prompt_logprobs or 0)
        found["return_prompt_token_ids"] = True
        if given == 1:
            # Programs that score prompts ask so. They leave out the last token's value, whichever
            # token it is, so an end token must be among the tokens like any other.
            found["ignore_eos"] = True
    return found
