"""PEFT, accelerate and Lightning on converted models."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import sdgp_cusparselt as sdgp
from tests.foreign.comparing import MAGNITUDE, NONE, close, identical
from tests.foreign.models import gradients, prune_by_hooks
from tests.foreign.tally import Tally

pytestmark = pytest.mark.foreign
STEPS = 3


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).double().eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 64}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).double().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "llama": (llama, ["q_proj", "down_proj"]),
}


def batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        ids = torch.randint(3, 64, (2, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def first_loss(model: nn.Module) -> Tensor:
    value: Tensor = model(**next(batches())).loss
    return value


@pytest.mark.parametrize("name", MODELS)
def test_lora(name: str, tally: Tally) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    build, targets = MODELS[name]

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        found: nn.Module = peft.get_peft_model(model, settings)
        return found.double()

    def converted(model: nn.Module, config: sdgp.SDGPConfig) -> nn.Module:
        sdgp.convert_(model, config, preset="all")
        return model

    def none_before() -> None:
        got = gradients(adapted(converted(build(), NONE)), first_loss)
        identical(list(got.values()), list(gradients(adapted(build()), first_loss).values()))

    def none_after() -> None:
        got = gradients(converted(adapted(build()), NONE), first_loss)
        identical(got, gradients(adapted(build()), first_loss))

    def pruned_after() -> None:
        model, reference = adapted(build()), adapted(build())
        report = sdgp.convert_(model, MAGNITUDE, preset="all")
        assert any(key.endswith("base_layer") for key in report.converted), report.converted
        prune_by_hooks(reference, list(report.converted))
        close(gradients(model, first_loss), gradients(reference, first_loss))

    def merged() -> None:
        model = adapted(converted(build(), MAGNITUDE))
        expected = model(**next(batches())).logits
        plain = model.merge_and_unload()
        close(plain(**next(batches())).logits, expected)

    for check in (none_before, none_after, pruned_after, merged):
        tally.check(f"peft {name} {check.__name__}", check)


def plain_loop(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def accelerate_loop(model: nn.Module) -> nn.Module:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    for batch in batches():
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
    return accelerator.unwrap_model(model)


def lightning_loop(model: nn.Module) -> nn.Module:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    module.train(model.training)
    trainer.fit(module, torch.utils.data.DataLoader(list(batches()), batch_size=None))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loop", [accelerate_loop, lightning_loop])
def test_a_library_trains_as_the_plain_loop(
    name: str, loop: Callable[[nn.Module], nn.Module], tally: Tally
) -> None:
    build, _ = MODELS[name]
    for config in (NONE, MAGNITUDE):
        with tally.case(f"{loop.__name__} {name} {config.prune}"):
            model = build()
            sdgp.convert_(model, config, preset="all")
            twin = copy.deepcopy(model)
            identical(loop(model).state_dict(), plain_loop(twin).state_dict())
