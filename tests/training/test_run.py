"""A run is a pure function of its spec, and a broken-off one goes on bit for bit."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdgp_cusparselt.training.checkpoint import CheckpointError, save_checkpoint
from sdgp_cusparselt.training.data import Dataset, Split
from sdgp_cusparselt.training.images import Augmentation, epoch_draws
from sdgp_cusparselt.training.methods import parse_method
from sdgp_cusparselt.training.optimizers import build_optimizer
from sdgp_cusparselt.training.recipe import Recipe
from sdgp_cusparselt.training.run import Precision, RunSpec, Stopped, Trainer
from sdgp_cusparselt.training.sweep import describe, execute
from sdgp_cusparselt.training.tasks import Task


def make(
    task: Task, method: str = "dense", seed: int = 0, precision: Precision = "fp32"
) -> Trainer:
    spec = RunSpec(task.name, parse_method(method), seed, task.recipe, "cpu", precision, "dense")
    return Trainer(spec, task, task.load())


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(trainer: Trainer) -> list[dict[str, object]]:
    return [{k: v for k, v in point.items() if k != "ms_per_step"} for point in trainer.history]


CASES = [
    ("image_task", "dense", "fp32"),
    ("augmented_task", "random", "fp32"),
    ("image_task", "random", "fp32"),
    ("image_task", "mvue", "fp32"),
    ("image_task", "mvue+warmup=0.4+tail=0.3", "fp32"),
    ("text_task", "rescaled_magnitude", "fp32"),
    ("text_task", "random", "bf16"),
]


@pytest.mark.parametrize("stop_at", [1, 4, 6, 8])
@pytest.mark.parametrize("fixture, method, precision", CASES)
def test_resume_is_bit_for_bit(
    fixture: str,
    method: str,
    precision: Precision,
    stop_at: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    task = request.getfixturevalue(fixture)
    unbroken = make(task, method, precision=precision)
    unbroken.train()

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Stopped, match=f"step {stop_at}"):
        first = make(task, method, precision=precision)
        first.train(checkpoint, should_stop=lambda step: step == stop_at)
    torch.manual_seed(12345)
    torch.rand(100)
    second = make(task, method, precision=precision)
    second.load(checkpoint)
    assert second.step == stop_at
    second.train(checkpoint)

    assert same(weights(unbroken), weights(second))
    assert without_time(unbroken) == without_time(second)
    assert unbroken.flops == second.flops and unbroken.backends == second.backends
    states = unbroken.optimizer.state_dict()["state"], second.optimizer.state_dict()["state"]
    for key, state in states[0].items():
        assert all(torch.equal(state[name], states[1][key][name]) for name in state)


def test_a_checkpoint_from_before_the_later_fields_is_accepted(
    image_task: Task, tmp_path: Path
) -> None:
    unbroken = make(image_task, "random")
    unbroken.train()
    first = make(image_task, "random")
    for _ in range(4):
        first.train_step()
    state = first.state_dict()
    # Written out as versions without decay, flip and so on wrote it.
    state["identity"] = {
        "task": "digits",
        "method": "random@2:4",
        "seed": 0,
        "recipe": {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "batch_size": 8,
            "epochs": 3,
            "steps": None,
            "peak_fraction": 0.2,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "label_smoothing": 0.1,
            "max_grad_norm": None,
        },
        "device_type": "cpu",
        "precision": "fp32",
        "backend": "dense",
        "data": first.dataset.fingerprint,
    }
    save_checkpoint(tmp_path / "old.pt", state)
    second = make(image_task, "random")
    second.load(tmp_path / "old.pt")
    second.train()
    assert same(weights(unbroken), weights(second))
    flipping = dataclasses.replace(image_task, recipe=image_task.recipe.replace(flip=True))
    with pytest.raises(CheckpointError, match="recipe is"):
        make(flipping, "random").load(tmp_path / "old.pt")


def test_accumulated_gradients_are_those_of_the_whole_batch(text_task: Task) -> None:
    """No batch norm here, and the mean over parts of equal size is the mean over the batch."""
    parts = dataclasses.replace(
        text_task, recipe=text_task.recipe.replace(gradient_accumulation=4, optimizer="sgd")
    )
    whole = dataclasses.replace(text_task, recipe=text_task.recipe.replace(optimizer="sgd"))
    one, other = make(whole), make(parts)
    for _ in range(3):
        one.train_step()
        other.train_step()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=0, atol=1e-6)
    assert float(one._interval.loss_sum) == pytest.approx(float(other._interval.loss_sum), rel=1e-6)
    assert one.flops == other.flops
    assert not same(weights(one), weights(make(whole)))


def test_augmentation_is_applied_to_the_batch_of_the_step(augmented_task: Task) -> None:
    trainer = make(augmented_task, seed=5)
    seen: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    for _ in range(5):
        trainer.train_step()
    recipe, split = augmented_task.recipe, augmented_task.load().train
    augmentation = Augmentation(recipe.flip, recipe.translate, recipe.cutout)
    # 24 examples in batches of 8, each in two parts: step 4 is the second of epoch 1.
    for step, epoch in ((0, 0), (4, 1)):
        order = np.random.default_rng([5, epoch]).permutation(24)
        for part in range(2):
            first = 8 * (step % 3) + 4 * part
            indices = torch.from_numpy(order[first : first + 4])
            inputs, _ = split.batch(indices, torch.device("cpu"))
            expected = augmentation.apply(inputs, epoch_draws(24, 5, epoch)[indices])
            assert torch.equal(seen[2 * step + part], expected)


def test_flip_evaluation_adds_the_logits_of_the_mirror_image(augmented_task: Task) -> None:
    trainer, split = make(augmented_task), augmented_task.load().validation
    # A linear model, so that a mirror image has quite other logits.
    trainer.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    inputs, _ = split.batch(torch.arange(len(split)), torch.device("cpu"))
    with torch.no_grad():
        one, two = trainer.model(inputs), trainer.model(inputs[:, :, :, list(range(7, -1, -1))])
    # Targets that the sum gets right and the image alone does not.
    targets = (one + two).argmax(1)
    assert not torch.equal(one.argmax(1), targets)
    trainer.dataset = Dataset(split, Split(split.inputs, targets), "made here")
    assert trainer.evaluate() == 100.0


@pytest.mark.parametrize("decay", ["matrices", "not_norms", "all"])
def test_what_is_decayed(decay: str) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
    )
    recipe = Recipe(epochs=1, decay=decay, weight_decay=0.3, optimizer="adamw")
    optimizer = build_optimizer(model, recipe)
    decayed, spared = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    names = [name for name, p in model.named_parameters() if id(p) in decayed]
    matrices = ["0.weight", "2.weight"]
    expected = {
        "matrices": matrices,
        "not_norms": [*matrices, "0.bias", "2.bias"],
        "all": [*matrices, "0.bias", "2.bias", "1.weight", "1.bias"],
    }[decay]
    assert sorted(names) == sorted(expected) and len(decayed) + len(spared) == 6


def test_methods_start_from_the_same_weights_and_see_the_same_batches(image_task: Task) -> None:
    methods = ("dense", "magnitude", "random", "mvue", "rescaled_magnitude@4:8")
    trainers = [make(image_task, method, seed=3) for method in methods]
    assert all(same(weights(trainers[0]), weights(other)) for other in trainers[1:])
    for _ in range(4):
        batches = [trainer._batch_indices() for trainer in trainers]
        assert all(torch.equal(batches[0], other) for other in batches[1:])
        for trainer in trainers:
            trainer.train_step()
    assert not same(weights(make(image_task, seed=4)), weights(make(image_task, seed=3)))


def test_an_epoch_sees_every_example_once(image_task: Task) -> None:
    trainer = make(image_task)
    seen = []
    for _ in range(trainer.steps_per_epoch):
        seen += trainer._batch_indices().tolist()
        trainer.train_step()
    assert sorted(seen) == list(range(24))


def test_pruning_changes_the_weights_and_none_does_not(image_task: Task) -> None:
    final = {}
    for method in ("dense", "none", "magnitude", "random"):
        trainer = make(image_task, method)
        trainer.train()
        final[method] = weights(trainer)
    assert same(final["dense"], final["none"])
    assert not same(final["dense"], final["magnitude"])
    assert not same(final["magnitude"], final["random"])


def test_a_share_of_the_steps_is_dense(image_task: Task) -> None:
    """To the bit: a warm-up is a dense run that begins to prune, a tail a pruned one that ends."""
    names = ("dense", "mvue", "mvue+warmup=0.5", "mvue+tail=0.5")
    runs, after = [], []
    for name in names:
        trainer = make(image_task, name)
        after.append([parameters_after_a_step(trainer) for _ in range(trainer.total_steps)])
        runs.append(trainer)
    total = runs[0].total_steps
    begin, end = round(0.5 * total), total - round(0.5 * total)
    for step, (dense, pruned, warmed, ended) in enumerate(zip(*after, strict=True)):
        assert not same(dense, pruned)
        assert same(dense, warmed) == (step < begin)
        assert same(pruned, ended) == (step < end)
    shares = [describe(trainer)["pruned_flop_share"] for trainer in map(finished, runs)]
    assert shares[0] == 0 and shares[2] == shares[3] == shares[1] / 2


def parameters_after_a_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Without what a schedule counts, which is in the state dict too."""
    trainer.train_step()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def finished(trainer: Trainer) -> Trainer:
    trainer.record()
    return trainer


def test_dense_equals_a_plain_loop(text_task: Task) -> None:
    """The loop that anyone would write, from the same weights on the same batches."""
    trainer, data = make(text_task), text_task.load()
    reference = text_task.build_model()
    reference.load_state_dict(trainer.model.state_dict())
    decayed = [p for p in reference.parameters() if p.dim() > 1]
    others = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for step in range(9):
        indices = trainer._batch_indices()
        for group in optimizer.param_groups:
            rising = 1e-4 + (1 - 1e-4) * step / 0.9
            group["lr"] = 6e-3 * (rising if step < 0.9 else (9 - step) / 8.1)
        logits = reference(data.train.inputs[indices].long())
        loss = F.cross_entropy(logits.view(-1, 256), data.train.targets[indices].view(-1).long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        trainer.train_step()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=0, atol=1e-6)


def test_bits_per_byte_and_accuracy_by_hand(image_task: Task, text_task: Task) -> None:
    for task in (image_task, text_task):
        trainer, split = make(task), task.load().validation
        inputs, targets = split.batch(torch.arange(len(split)), torch.device("cpu"))
        with torch.no_grad():
            log_p = trainer.model.eval()(inputs).double().log_softmax(-1)
        if task is image_task:
            hits = sum(int(p.argmax()) == int(t) for p, t in zip(log_p, targets, strict=True))
            expected = 100 * hits / len(targets)
        else:
            picked = log_p.gather(-1, targets.unsqueeze(-1))
            expected = float(-picked.mean()) / math.log(2)
        # Sums in fp32 over 10 * 8 targets of about 5 nats each.
        assert trainer.evaluate() == pytest.approx(expected, rel=80 * 2**-23)


def test_a_run_leaves_the_callers_generator_alone(image_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    spec = RunSpec("digits", parse_method("random"), 0, image_task.recipe, backend="dense")
    data = image_task.load()
    execute(spec, image_task, data, tmp_path, lambda s: False, lambda *a: None, lambda loss: None)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_another_run_is_refused(image_task: Task, tmp_path: Path) -> None:
    trainer = make(image_task)
    trainer.train_step()
    save_checkpoint(tmp_path / "a.pt", trainer.state_dict())
    other = make(image_task, "magnitude", seed=2)
    with pytest.raises(CheckpointError) as caught:
        other.load(tmp_path / "a.pt")
    assert "method is 'dense' there and 'magnitude@2:4' here" in str(caught.value)
    assert "seed is 0 there and 2 here" in str(caught.value)
    assert other.step == 0


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_checkpoint_is_named(content: bytes, image_task: Task, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pt must be a checkpoint of sdgp train"):
        make(image_task).load(path)


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"identity": {}, "step": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, {"step": (_ for _ in ())})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_biases_and_norms_are_not_decayed(image_task: Task) -> None:
    trainer = make(image_task)
    for group in trainer.optimizer.param_groups:
        vectors = {p.dim() <= 1 for p in group["params"]}
        assert vectors == {group["weight_decay"] == 0.0}
    sizes = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert sizes == sum(p.numel() for p in trainer.model.parameters())


def test_fp16_trains_with_a_loss_scaler(image_task: Task) -> None:
    trainer = make(image_task, "magnitude", precision="fp16")
    trainer.train_step()
    assert trainer.scaler.is_enabled() and trainer.scaler.state_dict()
    assert not make(image_task).scaler.is_enabled()
