"""Fine-tuning on a task: a model's weights, or low-rank corrections of them, are trained with a new linear head.

The head reads the vector that `STLM.embed` returns. Two texts are joined by a newline and give one vector, so that the
second is read in the context of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.progress import Progress
from stlm.config import LoRAConfig
from stlm.errors import StlmError
from stlm.evals.probing.glue import Example, GlueTask, labels_of
from stlm.evals.probing.protocol import MethodResult, Texts, inner_split, mean_score
from stlm.evals.probing.scores import require_sklearn
from stlm.stlm import STLM, batches_by_length

LORA_RANK = 8
_EPOCHS = 4
_BATCH_SIZE = 32
_SORTED_TOGETHER = 8  # batches whose texts are sorted by length, to reduce padding
_WEIGHT_DECAY = 0.01
_LARGEST_NORM = 1.0  # of the gradient


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning of the whole model or of low-rank corrections: a `Method`. `model` itself is not changed.

    For each learning rate, a copy of the model is trained for a few epochs by AdamW, with a rate that falls linearly to
    0. The copy and epoch that score best on the held-back examples predict `dev`. Equal seeds give bit-equal results on
    a CPU.
    """

    model: STLM
    learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    lora_rank: int | None = None  # None: all weights are trained
    epochs: int = _EPOCHS

    def __post_init__(self) -> None:
        require_sklearn("fine-tuning")

    def __call__(self, task: GlueTask, train: Sequence[Example], dev: Sequence[Texts], seed: int) -> MethodResult:
        learned, held_back = inner_split(task, train, seed)
        truth_N = labels_of(held_back)
        best, weights, chosen = -np.inf, {}, {}
        for rate in self.learning_rates:
            classifier = self._classifier(task, learned, seed)
            for epoch in self._learn(classifier, learned, rate, seed):
                found = mean_score(task, truth_N, classifier.predict([one.texts for one in held_back]))
                if found > best:
                    best, chosen = found, {"learning_rate": rate, "epochs": epoch}
                    weights = {name: value.clone() for name, value in classifier.state_dict().items()}
        if not weights:
            raise StlmError(f"fine-tuning: the loss became infinite at each learning rate of {self.learning_rates}")
        classifier.load_state_dict(weights)
        return MethodResult(classifier.predict(dev), {**chosen, "validation": best, "learned_from": len(learned)})

    def is_cut(self, texts: Texts) -> bool:
        return sum(map(len, encode_parts(self.model, texts))) > self.model.longest_text

    def _classifier(self, task: GlueTask, examples: Sequence[Example], seed: int) -> Classifier:
        base = self.model.merged() if self.model.config.lora.rank is not None else self.model
        config = replace(base.config, lora=LoRAConfig(self.lora_rank))
        model = STLM.from_config(config, base.tokenizer, seed)  # the seed initializes the corrections
        model.load_tensors({**dict(model.named_parameters()), **dict(base.named_parameters())}, "the copy")
        return Classifier(model, task, labels_of(examples)).to(base.device)

    def _learn(self, classifier: Classifier, examples: Sequence[Example], rate: float, seed: int) -> Iterator[int]:
        """Train, and yield the number of each epoch after it. Stops early where the loss is not finite."""
        parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=_WEIGHT_DECAY)
        steps = self.epochs * -(-len(examples) // _BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        ids_of = [classifier.encode(one.texts) for one in examples]
        label_N = torch.from_numpy(labels_of(examples))
        order = np.random.default_rng(seed)
        with Progress(total=steps, desc=f"learning rate {rate:g}", unit="step", delay=2, leave=False) as progress:
            for epoch in range(1, self.epochs + 1):
                classifier.train()
                for places in shuffled_batches([len(ids) for ids in ids_of], order):
                    loss = classifier.loss([ids_of[place] for place in places], label_N[places])
                    if not loss.isfinite():
                        return
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, _LARGEST_NORM)
                    optimizer.step()
                    schedule.step()
                    progress.update()
                yield epoch


class Classifier(nn.Module):
    """A model with a linear head on the mean of its states, for classes or for one standardised score."""

    def __init__(self, model: STLM, task: GlueTask, label_N: NDArray[np.float64]) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.width, task.classes or 1)
        nn.init.zeros_(self.head.weight)  # so that the head learns before the model's weights move
        nn.init.zeros_(self.head.bias)
        self.classes = task.classes
        self.mean, self.std = (0.0, 1.0) if task.classes else (float(label_N.mean()), float(label_N.std()))

    def encode(self, texts: Texts) -> Tensor:
        """Return the ids of one text, or of two joined by a newline. Where they do not fit, the longer one is cut at
        its end."""
        parts, room = encode_parts(self.model, texts), self.model.longest_text
        if len(parts) == 1:
            return parts[0][:room]
        first, between, second = parts
        room -= len(between)
        first = first[: max(room - len(second), room // 2)]
        return torch.cat((first, between, second[: room - len(first)]))

    def forward(self, ids: Sequence[Tensor]) -> Tensor:
        """Return logits [texts, classes] or standardised scores [texts, 1]."""
        lengths = torch.tensor([len(row) for row in ids], device=self.model.device)
        rows = pad_sequence(list(ids), batch_first=True).to(self.model.device)
        return self.head(self.model.embed_ids(rows, lengths))

    def loss(self, ids: Sequence[Tensor], label_N: Tensor) -> Tensor:
        """Return the mean cross-entropy of classes, or the mean squared error of standardised scores."""
        found, label_N = self(ids), label_N.to(self.model.device)
        if self.classes:
            return F.cross_entropy(found, label_N.long())
        return F.mse_loss(found[:, 0], ((label_N - self.mean) / self.std).float())

    @torch.no_grad()
    def predict(self, texts: Sequence[Texts]) -> NDArray[np.float64]:
        """Return a class or a score for each example."""
        self.eval()
        ids_of = [self.encode(one) for one in texts]
        predicted_N = np.empty(len(ids_of))
        for places in batches_by_length([len(ids) for ids in ids_of], self.model.device):
            found = self([ids_of[place] for place in places])
            values = found.argmax(1) if self.classes else found[:, 0] * self.std + self.mean
            predicted_N[places] = values.cpu().numpy()
        return predicted_N


def encode_parts(model: STLM, texts: Texts) -> list[Tensor]:
    """Return the ids of each text, and of the newline between two."""
    parts = texts if len(texts) == 1 else (texts[0], "\n", texts[1])
    return [torch.from_numpy(model.tokenizer.encode(part).astype(np.int64)) for part in parts]


def shuffled_batches(lengths: Sequence[int], order: np.random.Generator) -> list[list[int]]:
    """Return all indices once, in random batches of examples of similar length."""
    places = order.permutation(len(lengths))
    batches = []
    for start in range(0, len(places), _BATCH_SIZE * _SORTED_TOGETHER):
        near = sorted(places[start : start + _BATCH_SIZE * _SORTED_TOGETHER].tolist(), key=lengths.__getitem__)
        batches += [near[first : first + _BATCH_SIZE] for first in range(0, len(near), _BATCH_SIZE)]
    return [batches[number] for number in order.permutation(len(batches))]
