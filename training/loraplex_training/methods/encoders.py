"""Networks that compute virtual tokens in training; only their outputs are saved.

They are PEFT's: for P-tuning (Liu et al. 2021, arXiv 2103.10385) an MLP, or a bidirectional LSTM
followed by an MLP; for prefix tuning (Li and Liang 2021, arXiv 2101.00190) an MLP from one vector
per token to the keys and values of all layers. Initial values have the distributions of torch's
modules, drawn from the job's generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class TokenEncoder(nn.Module):
    """Trained inputs, one per token, and the network that maps them to virtual tokens."""

    def __init__(self, embedding: nn.Embedding, lstm: nn.LSTM | None, head: nn.Sequential) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = embedding, lstm, head

    def forward(self) -> torch.Tensor:
        """Computes all virtual tokens, [n, out]."""
        inputs = self.embedding.weight
        if self.lstm is not None:
            inputs = self.lstm(inputs)[0]  # [n, 2 * hidden], both directions concatenated
        outputs: torch.Tensor = self.head(inputs)
        return outputs


def mlp(count: int, width: int, hidden: int, generator: torch.Generator) -> TokenEncoder:
    """PEFT's MLP of P-tuning. It has three layers; PEFT ignores `encoder_num_layers` here."""
    with torch.device("meta"):
        head = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )
        encoder = TokenEncoder(nn.Embedding(count, width), None, head)
    return _filled(encoder, generator)


def lstm(
    count: int, width: int, hidden: int, layers: int, generator: torch.Generator
) -> TokenEncoder:
    """PEFT's LSTM of P-tuning, followed by two linear layers."""
    with torch.device("meta"):
        recurrent = nn.LSTM(width, hidden, layers, batch_first=True, bidirectional=True)
        head = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)
        )
        encoder = TokenEncoder(nn.Embedding(count, width), recurrent, head)
    return _filled(encoder, generator)


def projection(
    count: int, width: int, hidden: int, out: int, generator: torch.Generator
) -> TokenEncoder:
    """PEFT's `prefix_projection`: two linear layers with a tanh between them."""
    with torch.device("meta"):
        head = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))
        encoder = TokenEncoder(nn.Embedding(count, width), None, head)
    return _filled(encoder, generator)


def _filled(encoder: TokenEncoder, generator: torch.Generator) -> TokenEncoder:
    """Allocates the encoder's tensors on the CPU and draws their values."""
    encoder.to_empty(device="cpu")
    with torch.no_grad():
        for parameter, bound in _bounds(encoder):
            if bound is None:
                parameter.normal_(generator=generator)
            else:
                parameter.uniform_(-bound, bound, generator=generator)
    return encoder


def _bounds(encoder: TokenEncoder) -> Iterator[tuple[torch.Tensor, float | None]]:
    """Yields every parameter and the bound of its uniform distribution; None: a normal one."""
    yield encoder.embedding.weight, None
    if encoder.lstm is not None:
        for parameter in encoder.lstm.parameters():
            yield parameter, encoder.lstm.hidden_size**-0.5
    for module in encoder.head:
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                yield parameter, module.in_features**-0.5
