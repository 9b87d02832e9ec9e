"""The messages of a stream."""

from __future__ import annotations

from loraplex.v1 import generation_pb2

from loraplex_server.logs import REQUEST_ID
from loraplex_server.rpc.messages.completion import FINISH_REASONS, Piece, add_logprobs
from loraplex_server.rpc.services.completions.call import CompletionRun, GenerationCall
from loraplex_server.text.tokenizer import TextTokenizer

Event = generation_pb2.GenerateStreamResponse


def started_event(call: GenerationCall) -> Event:
    """The first event of a call, still without log-probabilities of the prompt."""
    return Event(
        started=generation_pb2.GenerationStarted(
            request_id=REQUEST_ID.get(),
            adapters=[
                generation_pb2.ResolvedAdapter(
                    name=each.adapter.record.name,
                    version=each.adapter.record.version,
                    digest=each.adapter.record.digest,
                    weight=each.weight,
                )
                for each in call.adapters
            ],
            prompt_tokens=len(call.prompt),
            prompt_token_ids=call.prompt if call.request.return_prompt_token_ids else (),
        )
    )


async def delta_event(piece: Piece, index: int, tokenizer: TextTokenizer) -> Event:
    """New text and tokens of completion `index`."""
    event = Event(
        delta=generation_pb2.GenerationDelta(
            text=piece.text, token_ids=piece.token_ids, index=index
        )
    )
    await add_logprobs(event.delta.logprobs, tokenizer, piece.logprobs)
    return event


def finished_event(piece: Piece, prompt_tokens: int, run: CompletionRun) -> Event:
    """The end of a completion with its last piece."""
    usage = generation_pb2.Usage(
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=run.text.cached_tokens,
        completion_tokens=run.text.tokens,
        base_prompt_tokens=run.text.base_tokens,
    )
    return Event(
        finished=generation_pb2.GenerationFinished(
            finish_reason=FINISH_REASONS[piece.finish],
            usage=usage,
            matched_stop=piece.matched_stop,
            index=run.index,
        )
    )
