"""The digits, and how a network is trained on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from benchmarks.timing import time_once

from .network import Attention, Network

SEED = 0
IMAGE_SIZE = 28  # enlarged from 8, so that a kernel of 7 pixels sees a part of a digit
EPOCHS, BATCH, LEARNING_RATE = 8, 64, 0.1


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 28, 28] from 0 to 1 and labels [N], to train with and to test with."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def steps(self) -> int:
        """Batches in the whole training; only full ones count."""
        return EPOCHS * (len(self.labels) // BATCH)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the training, the same at each call."""
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(EPOCHS):
            order = torch.randperm(len(self.labels), generator=generator)
            for chosen in order.to(self.labels.device).split(BATCH)[: len(order) // BATCH]:
                yield self.images[chosen], self.labels[chosen]


def load(device: torch.device) -> Digits:
    """The 1797 handwritten digits of scikit-learn; a quarter of them is for the test."""
    pixels, names = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    labels = torch.tensor(names, device=device)
    train, test = train_test_split(
        range(len(names)), test_size=0.25, random_state=SEED, stratify=names
    )
    return Digits(images[train], labels[train], images[test], labels[test])


class Run:
    """The training of one network, from the weights of `initial`.

    Args:
        attention: the class of its CBAM.
        initial: a network with the weights to begin with.
        steps: in the whole training, whether or not this run goes to its end.
        dtype: of weights and images.
        view: gives each batch another form with the same meaning.
    """

    def __init__(
        self,
        attention: Attention,
        initial: Network,
        steps: int,
        dtype: torch.dtype = torch.float32,
        view: Callable[[Tensor], Tensor] = lambda batch: batch,
    ) -> None:
        weight = initial.classifier.weight
        self.network = Network(attention).to(weight.device, dtype)
        self.network.load_state_dict(initial.state_dict())
        self.dtype, self.view = dtype, view
        self.losses: list[float] = []
        self.microseconds: list[float] = []
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One timed step on one batch."""
        images, labels = self.view(images).to(self.dtype), self.view(labels)
        self.microseconds.append(time_once(lambda: self._step(images, labels), images.device))

    def _step(self, images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())

    @property
    def step_milliseconds(self) -> float:
        """The median over all steps but the first."""
        return statistics.median(self.microseconds[1:]) / 1e3

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        """The fraction of the test images that it names right."""
        named = self.network.eval()(digits.test_images.to(self.dtype)).argmax(1)
        return (named == digits.test_labels).double().mean().item()


def train(digits: Digits, runs: list[Run], probes: list[Run], probed_steps: int) -> None:
    """Train `runs` to the end and `probes` for their first steps, taking turns at each batch.

    Taking turns is fair to the times: a busy moment of the machine hits all of them.
    """
    with tqdm(digits.batches(), total=digits.steps, unit="step", desc="training") as progress:
        for index, batch in enumerate(progress):
            for run in [*runs, *probes] if index < probed_steps else runs:
                run.step(*batch)
            progress.set_postfix_str("losses " + " ".join(f"{r.losses[-1]:.4f}" for r in runs))
