"""MeZO on all weights, in plain PyTorch: a process of its own, started by ``run.py``, that makes one run after another.

Algorithm 1 of Malladi et al., "Fine-tuning language models with just forward passes", arXiv 2305.17333: the weights are
moved in place along Gaussian noise that is drawn again from its seed, to both sides and back, and the rate is constant.
All weights lie in one buffer, so that a move is one draw and one addition. The loss of rows is the server's own
(``server_ext.rows``).

It reads a run a line from standard input, and answers with a list of figures a line, one for each budget.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plan
import torch
from through_server import figures

from server_ext.rows import Context, ContextScore, TokenRow, contexts_of, score_of, tokenise_rows
from server_ext.schemas import ChoicesRow
from zoact_remote import evaluate
from zoact_remote.cli.settings import DEFAULTS
from zoact_remote.wire import Row, RowScore, Scores

EPSILON = 1e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Network:
    """The model, with its weights in one buffer that may be moved."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_float32_matmul_precision("high")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._network = network.to(DEVICE).eval().requires_grad_(False)
        parameters = list(self._network.parameters())
        self.weights = torch.cat([parameter.data.reshape(-1) for parameter in parameters])
        parts = torch.split(self.weights, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view_as(parameter)
        self._draw = torch.Generator(DEVICE)

    def move(self, seed: int, distance: float) -> None:
        """Moves the weights along the seed's noise."""
        noise = torch.randn(len(self.weights), generator=self._draw.manual_seed(seed), device=DEVICE)
        self.weights.add_(noise, alpha=distance)

    def tokenise(self, rows: Sequence[Row]) -> list[TokenRow]:
        def encode(text: str, special: bool) -> list[int]:
            return list(self._tokenizer.encode(text, add_special_tokens=special))

        config = self._network.config
        checked = [ChoicesRow(**row) for row in rows]
        return list(tokenise_rows(checked, encode, lambda *_: "", config.vocab_size, config.max_position_embeddings))

    def loss(self, rows: Sequence[TokenRow]) -> float:
        return float(np.mean([loss for _, loss in self.score(rows)]))

    def score(self, rows: Sequence[TokenRow]) -> list[tuple[tuple[float, ...], float]]:
        """Every row's log-likelihoods and its loss."""
        contexts = [contexts_of(row) for row in rows]
        scores = iter(self._score([context for of_row in contexts for context in of_row]))
        found = [score_of(row, cs, [next(scores) for _ in cs]) for row, cs in zip(rows, contexts, strict=True)]
        return [(score.logprobs, score.loss) for score in found]

    @torch.inference_mode()
    def _score(self, contexts: Sequence[Context]) -> list[ContextScore]:
        # Padding stands on the right, where causal attention lets nothing see it, so that no mask is needed.
        ids = torch.zeros(len(contexts), max(len(c.tokens) for c in contexts), dtype=torch.long)
        places: list[tuple[int, int]] = []
        wanted: list[tuple[int, int]] = []
        for i, context in enumerate(contexts):
            ids[i, : len(context.tokens)] = torch.tensor(context.tokens)
            for position in range(context.start, len(context.tokens)):
                wanted.append((len(places), context.tokens[position]))
                places.append((i, position - 1))
            wanted += [(len(places), token) for token in context.candidates]
            places.append((i, len(context.tokens) - 1))
        hidden = self._network.base_model(input_ids=ids.to(DEVICE), use_cache=False).last_hidden_state
        row, position = torch.tensor(places, device=DEVICE).T
        logprobs = self._network.get_output_embeddings()(hidden[row, position]).log_softmax(-1)
        place, token = torch.tensor(wanted, device=DEVICE).T
        values = iter(logprobs[place, token].tolist())
        return [
            ContextScore(
                tuple(next(values) for _ in range(context.start, len(context.tokens))),
                tuple(next(values) for _ in context.candidates),
            )
            for context in contexts
        ]


class Scorer:
    """The network as what ``zoact_remote.evaluate`` evaluates."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def scores(self, rows: Sequence[Row], *, version: int | None = None) -> Scores:
        tokens = self._network.tokenise(rows)
        scored = tuple(
            RowScore(logprobs, tuple(map(len, row.continuations)), loss)
            for row, (logprobs, loss) in zip(tokens, self._network.score(tokens), strict=True)
        )
        return Scores(version or 0, scored, float(np.mean([score.loss for score in scored])), 0)


def train(network: Network, run: plan.Run, marks: Sequence[int], data: Path, is_trial: bool) -> list[dict[str, Any]]:
    training, choice, examples = plan.data_of(run.task, data)
    held_out = [example.row for example in examples]
    rows = network.tokenise(training)
    scorer = Scorer(network)
    start = evaluate(scorer, held_out)
    draw = np.random.default_rng(run.seed)
    order: list[int] = []
    results: list[dict[str, Any]] = []
    seconds, diverged = 0.0, False
    for step in range(1, marks[-1] // 2 + 1):
        started = time.perf_counter()
        if len(order) < DEFAULTS.batch_size:
            order += draw.permutation(len(rows)).tolist()
        batch = [rows[order.pop(0)] for _ in range(DEFAULTS.batch_size)]
        seed = int(draw.integers(2**62))
        if not diverged:
            network.move(seed, EPSILON)
            plus = network.loss(batch)
            network.move(seed, -2.0 * EPSILON)
            minus = network.loss(batch)
            slope = (plus - minus) / (2.0 * EPSILON)
            diverged = not math.isfinite(slope)
            # Back, and the step.
            network.move(seed, EPSILON - (0.0 if diverged else run.rate * slope))
        seconds += time.perf_counter() - started
        if 2 * step in marks:
            last = 2 * step == marks[-1]
            results.append(
                {
                    "passes": 2 * step,
                    **figures(start, evaluate(scorer, held_out)),
                    "choice_accuracy": evaluate(scorer, choice).accuracy if is_trial and last else None,
                    "returns": 0,
                    "diverged": diverged,
                    "training_seconds": seconds,
                    "finished": time.time(),
                }
            )
    return results


def main() -> None:
    model, data = sys.argv[1:]
    network = Network(model)
    fresh = network.weights.clone()
    for line in sys.stdin:
        ask = json.loads(line)
        network.weights.copy_(fresh)
        results = train(network, plan.Run(**ask["run"]), ask["marks"], Path(data), ask["is_trial"])
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
