"""Trainers of others: a run that is resumed ends with the weights of an unbroken one.

The schedule has a dense start, a change of method and a dense tail: a run that started it anew, or
that never left a phase, ends with other weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import sdgp_cusparselt as sdgp
from sdgp_cusparselt.integrations import accelerate as on_accelerate
from sdgp_cusparselt.integrations import timm as on_timm
from sdgp_cusparselt.integrations.driver import Driver, metrics
from sdgp_cusparselt.integrations.lightning import SDGPCallback as LightningSDGP
from sdgp_cusparselt.integrations.transformers import SDGPCallback, log_first
from tests.loops.examples import load

STEPS, BROKEN_AT = 8, 4
SCHEDULE = sdgp.Schedule(
    total_steps=STEPS, warmup=2, tail=2, methods=((3, "rescaled_magnitude"), (5, "magnitude"))
)
CONFIG = sdgp.SDGPConfig(prune="magnitude", backend="dense", schedule=SCHEDULE)
tiny_gpt = load("tiny_gpt")


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    others = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, others[name]), name


class Phases(TrainerCallback):
    """Keeps which method pruned in each step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = [m for m in kwargs["model"].modules() if isinstance(m, sdgp.nn.SDGPModule)]
        self.seen.append(layers[0].sdgp_config.prune)


EXPECTED = ["none", "none", "magnitude", *["rescaled_magnitude"] * 2, "magnitude", "none", "none"]


def trainer(folder: Path, callback: SDGPCallback, phases: Phases, **options: Any) -> Trainer:
    settings = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        logging_steps=2,
        save_steps=BROKEN_AT,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = tiny_gpt.Text(16)
    return Trainer(
        tiny_gpt.build_model(), settings, train_dataset=data, callbacks=[callback, phases]
    )


def test_a_resumed_trainer_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    phases = Phases()
    unbroken = trainer(tmp_path / "whole", SDGPCallback(CONFIG), phases)
    log_first(unbroken)
    assert isinstance(unbroken.callback_handler.callbacks[0], SDGPCallback)
    unbroken.train()
    assert phases.seen == EXPECTED
    logged = [entry for entry in unbroken.state.log_history if "loss" in entry]
    assert [entry["sdgp/step"] for entry in logged] == [2, 4, 6, 8]
    assert [entry["sdgp/pruning_layers"] for entry in logged] == [1, 1, 0, 0]

    again = Phases()
    resumed = trainer(tmp_path / "again", SDGPCallback(CONFIG), again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{BROKEN_AT}"))
    assert again.seen == EXPECTED[BROKEN_AT:]
    assert_same_weights(resumed.model, unbroken.model)

    saved = json.loads((tmp_path / "again" / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["SDGPCallback"]["attributes"]["saved"]
    assert kept == sdgp.schedule_state(resumed.model) == {"step": STEPS}
    # The optimizer is let go of: the model may be driven by hand, or trained again.
    assert sdgp.step(resumed.model) == STEPS + 1


def test_a_trainer_whose_checkpoints_lack_the_step_goes_on_all_the_same(tmp_path: Path) -> None:
    """As with adapters alone: the weights' file has no state of the base model."""
    phases = Phases()
    trainer(tmp_path, SDGPCallback(CONFIG), phases).train()
    checkpoint = tmp_path / f"checkpoint-{BROKEN_AT}"
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "sdgp_schedule" not in key}
    assert len(kept) < len(weights)
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    again = Phases()
    trainer(tmp_path, SDGPCallback(CONFIG), again).train(resume_from_checkpoint=str(checkpoint))
    assert again.seen == EXPECTED[BROKEN_AT:]


def test_a_converted_model_is_driven_and_a_driven_one_refused(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    sdgp.convert_(model, CONFIG)
    driver = Driver()
    driver.start(model, [torch.optim.SGD(nn.Linear(2, 2).parameters()), optimizer(model)])
    assert driver.report is None
    with pytest.raises(ValueError, match="step_with drives already"):
        Driver().start(model, [optimizer(model)])
    with pytest.raises(ValueError, match="converted already"):
        Driver(CONFIG).convert(model)
    driver.stop()
    driver.stepped()
    assert driver.state_dict() == {"step": 1}, "counted by hand where no optimizer takes hooks"


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    KEPT.append(made)
    return made


#: A driver whose optimizer is gone drives nothing, so the tests keep theirs.
KEPT: list[torch.optim.Optimizer] = []


class Regression(lightning.LightningModule):
    """Two layers and data that follow from the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.phases: list[str] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.phases.append(self.net[0].sdgp_config.prune)
        # By the step, because Lightning's loaders do not go on where a checkpoint stood.
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.global_step))
        loss: Tensor = (self.net(x) - x).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, max_steps: int, resume: Path | None = None) -> Regression:
    module = Regression()
    data = DataLoader(torch.zeros(STEPS), batch_size=1)
    host = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[LightningSDGP(CONFIG)],
        logger=lightning.pytorch.loggers.CSVLogger(folder),
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    host.fit(module, data, ckpt_path=resume, weights_only=True)
    host.save_checkpoint(folder / f"{max_steps}.ckpt")
    return module


def test_a_resumed_lightning_run_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = fit(tmp_path / "whole", STEPS)
    assert unbroken.phases == EXPECTED
    fit(tmp_path, BROKEN_AT)
    resumed = fit(tmp_path, STEPS, tmp_path / f"{BROKEN_AT}.ckpt")
    assert resumed.phases == EXPECTED[BROKEN_AT:]
    assert_same_weights(resumed, unbroken)
    rows = (tmp_path / "whole/lightning_logs/version_0/metrics.csv").read_text()
    assert "sdgp/step" in rows
    saved = torch.load(tmp_path / f"{BROKEN_AT}.ckpt", weights_only=True)
    assert {"step": BROKEN_AT} in saved["callbacks"].values()
    assert "net.0.sdgp_schedule._extra_state" in saved["state_dict"]


def test_accelerate_saves_and_loads_the_step(tmp_path: Path) -> None:
    def start() -> tuple[Accelerator, nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        accelerator = Accelerator(cpu=True)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
        prepared = on_accelerate.prepare(accelerator, model, adam, config=CONFIG)
        return accelerator, *prepared

    def train(run: tuple[Accelerator, nn.Module, Any], steps: range) -> list[str]:
        accelerator, model, adam = run
        seen = []
        for number in steps:
            seen.append(model[0].sdgp_config.prune)
            torch.manual_seed(number)
            x = torch.randn(4, 8)
            accelerator.backward((model(x) - x).square().mean())
            adam.step()
            adam.zero_grad()
        on_accelerate.log(accelerator, model)
        return seen

    unbroken = start()
    assert train(unbroken, range(STEPS)) == EXPECTED
    first = start()
    train(first, range(BROKEN_AT))
    first[0].save_state(str(tmp_path))
    second = start()
    second[0].load_state(str(tmp_path))
    assert train(second, range(BROKEN_AT, STEPS)) == EXPECTED[BROKEN_AT:]
    assert_same_weights(second[1], unbroken[1])


def test_flags_of_a_script() -> None:
    parser = argparse.ArgumentParser()
    on_timm.add_arguments(parser)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    off = parser.parse_args([])
    assert on_timm.convert_from(off, model) is None
    assert on_timm.follow(off, optimizer(model), model) is None
    words = "--sdgp magnitude --sdgp-n 1 --sdgp-warmup 0.2 --sdgp-tail 0.1 --sdgp-steps 10"
    args = parser.parse_args(words.split())
    report = on_timm.convert_from(args, model)
    assert report is not None and report.converted == ["0", "1"]
    sgd = optimizer(model)
    on_timm.follow(args, sgd, model)
    seen = []
    for _ in range(10):
        seen.append(model[0].sdgp_config.describe())
        sgd.step()
    assert seen == ["none"] * 2 + ["magnitude 1:4"] * 7 + ["none"]
    with pytest.raises(ValueError, match="total_steps"):
        on_timm.convert_from(parser.parse_args(["--sdgp", "mvue", "--sdgp-tail", "0.1"]), model)


def test_metrics_count_what_ran() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sdgp.convert_(model, sdgp.SDGPConfig(prune="magnitude", backend="dense", telemetry_every=1))
    model(torch.randn(4, 16)).sum().backward()
    found = metrics(model)
    assert found["sdgp/pruning_layers"] == 1 and found["sdgp/sparse_calls"] == 0
    assert 0 < found["sdgp/gradient_error"] < 1 and found["sdgp/fallbacks"] == 0
    model[0].sdgp_record.calls["grad_input", "sparse"] += 3
    assert metrics(model)["sdgp/sparse_calls"] > 0.5


def test_no_host_is_imported_by_the_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys, sdgp_cusparselt, sdgp_cusparselt.integrations.driver, "
        "sdgp_cusparselt.integrations.timm, sdgp_cusparselt.integrations.accelerate\n"
        "hosts = {'transformers', 'lightning', 'accelerate', 'timm', 'torchtitan', 'peft'}\n"
        "assert not hosts & set(sys.modules), hosts & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
