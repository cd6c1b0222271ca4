"""torchtitan (0.3): ``SDGPConverter.Config()`` among a model's converters, and ``follow(spec)``.

    spec = model_registry("8B", converters=[SDGPConverter.Config(config=SDGPConfig())])
    follow(spec)    # only for a schedule: counts the optimizer's steps

torchtitan builds its own Linear from a tree of configurations; the converter has it build this one
instead, before anything is sharded or compiled. Its checkpoints carry the step of a schedule.
"""

import dataclasses
from typing import Any

from torch import nn
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.errors import value_error
from sdgp_cusparselt.integrations.driver import is_converted
from sdgp_cusparselt.layers.convert import is_head
from sdgp_cusparselt.layers.modules import SDGPLinear, adopt_
from sdgp_cusparselt.layers.schedule_state import NAME, ScheduleState
from sdgp_cusparselt.layers.stepping import step_with


class TitanScheduleState(ScheduleState, Module):  # type: ignore[misc]
    """torchtitan's models consist of its own kind of modules throughout."""


class TitanSDGPLinear(SDGPLinear, Module):  # type: ignore[misc]
    """torchtitan's Linear with a pruned backward."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):  # type: ignore[misc]
        """Of Linear, how it prunes, and its name for messages."""

        sdgp: SDGPConfig = dataclasses.field(default_factory=SDGPConfig)
        name: str = ""

    def __init__(self, config: Config) -> None:
        nn.Linear.__init__(self, config.in_features, config.out_features, bias=config.bias)
        own = type(self)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        adopt_(self, config.sdgp, config.name)
        self.__class__ = own
        if config.sdgp.schedule is not None:
            self.add_module(NAME, TitanScheduleState(self))


class SDGPConverter(ModelConfigConverter):  # type: ignore[misc]
    """Has every suitable Linear of a model built with a pruned backward; heads stay plain."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):  # type: ignore[misc]
        """How to prune."""

        config: SDGPConfig = dataclasses.field(default_factory=SDGPConfig)
        include_heads: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Any) -> Any:
        """Return the tree with other configurations of Linear layers.

        Raises:
            ValueError: it has none that can be pruned.
        """
        found = 0
        for fqn, linear, parent, attribute in model_config.traverse(Linear.Config):
            if type(linear) is not Linear.Config or not self._fits(fqn, linear):
                continue
            fields = {f.name: getattr(linear, f.name) for f in dataclasses.fields(linear)}
            converted = TitanSDGPLinear.Config(**fields, sdgp=self.config.config, name=fqn)
            found += 1
            if isinstance(parent, list):
                parent[attribute] = converted
            else:
                setattr(parent, attribute, converted)
        if not found:
            fix = "Its linear layers must be torchtitan's own, with outputs that m divides."
            got = type(model_config).__name__
            raise value_error("SDGPConverter", "model", "one with linear layers", got, fix)
        return model_config

    def _fits(self, fqn: str, linear: Any) -> bool:
        # torchtitan calls the head of its models "output" or "lm_head".
        head = is_head(fqn) or fqn.rpartition(".")[2] == "output"
        divides = linear.out_features % self.config.config.m == 0
        return divides and (self.config.include_heads or not head)


def follow(spec: Any) -> None:
    """Have a ModelSpec's schedule count the steps of the optimizers that torchtitan will build.

    Args:
        spec: a ``torchtitan.protocols.model_spec.ModelSpec``; changed in place.
    """
    before = spec.post_optimizer_build_fn

    def after_build(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        if before is not None:
            before(optimizers, model_parts, parallel_dims)
        for part in model_parts:
            if is_converted(part):
                step_with(optimizers, part)

    spec.post_optimizer_build_fn = after_build
