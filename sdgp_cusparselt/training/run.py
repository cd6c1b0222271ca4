"""RunSpec says what one run is; Trainer carries it out, stops anywhere and goes on bit for bit."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_cusparselt.config.choices import BackendName
from sdgp_cusparselt.layers.convert import convert_
from sdgp_cusparselt.layers.stepping import step_with
from sdgp_cusparselt.training.backends_used import backends_used
from sdgp_cusparselt.training.checkpoint import load_checkpoint, save_checkpoint
from sdgp_cusparselt.training.data import Dataset, Draw, epoch_order
from sdgp_cusparselt.training.flops import GradInputFlops, count_grad_input_flops
from sdgp_cusparselt.training.images import Augmentation, epoch_draws, mirrored
from sdgp_cusparselt.training.methods import Method
from sdgp_cusparselt.training.optimizers import build_optimizer
from sdgp_cusparselt.training.recipe import Recipe, triangular
from sdgp_cusparselt.training.tasks import Task
from sdgp_cusparselt.weights import WeightRecipe, mask_gradients_, sparsify_

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION_BATCH = 256


#: Told after each step, with its loss as a tensor: reading it makes the host wait for the device.
OnStep = Callable[[Tensor], None]


class Stopped(Exception):
    """A run was asked to stop, and did so after saving its checkpoint."""


@dataclass(frozen=True)
class RunSpec:
    """One run: a pure function of these fields, the data and the machine.

    Args:
        task: name in ``TASKS``.
        method: dense or a prune method.
        seed: of weights, batch order and random pruning.
        recipe: hyper-parameters.
        device: as ``torch.device`` reads it.
        precision: fp32, or the autocast dtype; fp16 trains with a loss scaler.
        backend: of the converted layers.
        model: description of the model, where the task's name alone does not say it.
    """

    task: str
    method: Method
    seed: int
    recipe: Recipe
    device: str = "cpu"
    precision: Precision = "fp32"
    backend: BackendName = "auto"
    model: str = ""

    @property
    def name(self) -> str:
        """Stem of the run's files."""
        return f"{self.task}-{self.method.slug}-seed{self.seed}"

    def identity(self, dataset: Dataset) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to be this run's, as plain values."""
        # Built-in tasks have no description, and runs of earlier versions no such key.
        described: dict[str, Any] = {"model": self.model} if self.model else {}
        weights = self.weight_recipe(dataset)
        described |= {"weights": weights.as_dict()} if weights else {}
        return {
            "task": self.task,
            **described,
            "method": self.method.spelling,
            "seed": self.seed,
            "recipe": self.recipe.identity(),
            "device_type": torch.device(self.device).type,
            "precision": self.precision,
            "backend": self.backend,
            "data": dataset.fingerprint,
        }

    def weight_recipe(self, dataset: Dataset) -> WeightRecipe | None:
        """Return what the weights follow, or None where they are dense."""
        return self.method.weight_recipe(self.recipe.total_steps(len(dataset.train)))


@dataclass
class Interval:
    """What happened since the last evaluation."""

    loss_sum: Tensor
    steps: int = 0
    seconds: float = 0.0


class Trainer:
    """Model, optimizer and counters of one run.

    Args:
        spec: the run.
        task: the task that ``spec`` names.
        dataset: its data.

    Raises:
        ValueError: the recipe does not fit the data, or the method fits no layer of the model.
    """

    def __init__(self, spec: RunSpec, task: Task, dataset: Dataset) -> None:
        self.spec, self.task, self.dataset = spec, task, dataset
        self.device = torch.device(spec.device)
        self.steps_per_pass = spec.recipe.total_steps(len(dataset.train))
        self.total_steps = self.steps_per_pass * spec.method.passes
        self.steps_per_epoch = spec.recipe.steps_per_epoch(len(dataset.train))
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.flops = GradInputFlops()
        self.backends: list[str] = []
        recipe = spec.recipe
        self.augmentation = Augmentation(recipe.flip, recipe.translate, recipe.cutout)
        self._order: tuple[int, Tensor] | None = None
        self._draws: tuple[int, Tensor] | None = None
        self._interval = self._new_interval()
        self.loss = self._interval.loss_sum  # of the last step
        self._build()

    def _build(self) -> None:
        spec = self.spec
        torch.manual_seed(spec.seed)
        model = self.task.build_model().to(self.device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.converted: list[str] = []
        self.skipped: dict[str, str] = {}
        self.pruned: list[str] = []  # those whose grad_input is pruned
        config = spec.method.config(spec.backend, self.total_steps)
        weights = spec.weight_recipe(self.dataset)
        if weights is not None:
            report = sparsify_(self.model, weights, config=config)
            self.converted, self.skipped = list(report.converted), dict(report.skipped)
        elif config is not None and not spec.method.weights:
            report = convert_(self.model, config, preset=spec.method.preset)
            self.converted, self.skipped = list(report.converted), dict(report.skipped)
            self.pruned = [name for name, own in report.configs.items() if own.prunes]
        self.optimizer = build_optimizer(self.model, spec.recipe)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: triangular(
                self._pass_step(step), self.steps_per_pass, spec.recipe.peak_fraction
            ),
        )
        if weights is not None or (config is not None and config.schedule is not None):
            step_with(self.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=spec.precision == "fp16")
        # Conversion may draw random numbers; what follows must not depend on it.
        torch.manual_seed(spec.seed)

    def _pass_step(self, step: int) -> int:
        """Return the step within the pass; after the last one its own last step, where lr is 0."""
        return step if step >= self.total_steps else step % self.steps_per_pass

    def _new_interval(self) -> Interval:
        return Interval(torch.zeros((), dtype=torch.float64, device=self.device))

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.total_steps

    def train_step(self) -> None:
        """Do one optimizer step on the next batch."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        counter = (
            contextlib.nullcontext(self.flops)
            if self.flops.by_layer
            else count_grad_input_flops(self.model)
        )
        with counter as flops:
            self._accumulate_gradients()
        self.flops = flops
        if self.spec.recipe.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            mask_gradients_(self.model)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.recipe.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self._interval.steps += 1
        self.step += 1

    def _accumulate_gradients(self) -> None:
        """Send the parts of the batch forward and backward; their mean loss is the batch's."""
        recipe, train = self.spec.recipe, self.dataset.train
        parts = self._parts(self.step)
        before = self._interval.loss_sum.clone()
        following = parts[1:]
        if self.step + 1 < self.total_steps:
            following = (*following, self._parts(self.step + 1)[0])
        for number, (draw, indices) in enumerate(parts):
            inputs, targets = train.batch(indices, self.device, draw)
            if number < len(following):
                train.prepare(following[number][1], following[number][0])
            if self.augmentation:
                inputs = self.augmentation.apply(inputs, self._epoch_draws(draw.epoch)[indices])
            with self._autocast():
                loss = self._loss(self.model(inputs), targets, recipe.label_smoothing)
                loss = loss / len(parts)
            self.scaler.scale(loss).backward()
            self._interval.loss_sum += loss.detach()
        self.loss = self._interval.loss_sum - before

    def _parts(self, step: int) -> tuple[tuple[Draw, Tensor], ...]:
        """Return the parts of one step's batch, each with what its augmentation depends on."""
        draw = Draw(self.spec.seed, step // self.steps_per_epoch)
        parts = self._batch_indices(step).chunk(self.spec.recipe.gradient_accumulation)
        return tuple((draw, part) for part in parts)

    def _batch_indices(self, step: int | None = None) -> Tensor:
        epoch, index = divmod(self.step if step is None else step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.dataset.train), self.spec.seed, epoch)
        size = self.spec.recipe.batch_size
        return self._order[1][index * size : (index + 1) * size]

    def _epoch_draws(self, epoch: int) -> Tensor:
        if self._draws is None or self._draws[0] != epoch:
            self._draws = epoch, epoch_draws(len(self.dataset.train), self.spec.seed, epoch)
        return self._draws[1]

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST_DTYPE.get(self.spec.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @staticmethod
    def _loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0, reduce: str = "mean") -> Any:
        flat = logits.float().flatten(0, -2)
        return F.cross_entropy(flat, targets.flatten(), label_smoothing=smoothing, reduction=reduce)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the task's metric over the validation examples."""
        self.model.eval()
        split, loss_sum, correct, count = self.dataset.validation, 0.0, 0, 0
        batches = torch.split(torch.arange(len(split)), EVALUATION_BATCH)
        for number, indices in enumerate(batches):
            inputs, targets = split.batch(indices, self.device)
            if number + 1 < len(batches):
                split.prepare(batches[number + 1])
            with self._autocast():
                logits = self.model(inputs)
                if self.spec.recipe.flip_evaluation:
                    logits = logits + self.model(mirrored(inputs))
            loss_sum += float(self._loss(logits, targets, reduce="sum"))
            correct += int((logits.argmax(dim=-1) == targets).sum())
            count += targets.numel()
        return self.task.score(loss_sum, correct, count)

    def record(self) -> None:
        """Evaluate, and close the interval with one point of the learning curve."""
        interval = self._interval
        self.backends = sorted({*self.backends, *backends_used(self.model)})
        self.history.append(
            {
                "step": self.step,
                "train_loss": finite(float(interval.loss_sum) / max(1, interval.steps)),
                "metric": finite(self.evaluate()),
                "ms_per_step": 1e3 * interval.seconds / max(1, interval.steps),
            }
        )
        self._interval = self._new_interval()

    def is_evaluation_step(self) -> bool:
        """Whether the learning curve gets a point here; the last step always does."""
        every = max(1, self.total_steps // self.task.evaluations)
        return self.finished or (self.step > 0 and self.step % every == 0)

    def train(
        self,
        checkpoint: Path | None = None,
        should_stop: Callable[[int], bool] = lambda step: False,
        on_step: OnStep = lambda loss: None,
    ) -> None:
        """Train to the end.

        Args:
            checkpoint: saved after every evaluation and when stopped; None saves nothing.
            should_stop: asked after each step, with the number of steps done.
            on_step: called after each step, with its loss.

        Raises:
            Stopped: ``should_stop`` said so; the checkpoint is saved.
        """
        while not self.finished:
            began = time.perf_counter()
            self.train_step()
            evaluate = self.is_evaluation_step()
            if evaluate and self.device.type == "cuda":
                # Steps are queued; only here does the clock see them done.
                torch.cuda.synchronize(self.device)
            self._interval.seconds += time.perf_counter() - began
            if evaluate:
                self.record()
            on_step(self.loss)
            stop = not self.finished and should_stop(self.step)
            if checkpoint is not None and (evaluate or stop):
                save_checkpoint(checkpoint, self.state_dict())
            if stop:
                raise Stopped(f"{self.spec.name} stopped at step {self.step}")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as tensors and plain values."""
        cuda = self.device.type == "cuda"
        return {
            "identity": self.spec.identity(self.dataset),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": self.history,
            "flops": self.flops.by_layer,
            "backends": self.backends,
            "interval": dataclasses.asdict(self._interval),
        }

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            CheckpointError: it is another run's, or no checkpoint.
        """
        state = load_checkpoint(path, self.spec.identity(self.dataset))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.flops, self.backends = GradInputFlops(state["flops"]), state["backends"]
        interval = state["interval"]
        self._interval = Interval(**(interval | {"loss_sum": interval["loss_sum"].to(self.device)}))
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def finite(value: float) -> float | None:
    """Return ``value``, or None for NaN and Inf, which JSON cannot hold."""
    return value if math.isfinite(value) else None
