"""A linear head with its cross-entropy, whose logits never exist as a whole."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sdgp_cusparselt.config.choices import SDGPConfig, check_config
from sdgp_cusparselt.config.patterns import checked_int
from sdgp_cusparselt.errors import NotSupportedError, SDGPError, type_error, value_error
from sdgp_cusparselt.layers import casting, shards
from sdgp_cusparselt.layers.plain import reason_against
from sdgp_cusparselt.layers.refusals import check_one_gradient, once
from sdgp_cusparselt.products import cross_entropy as products
from sdgp_cusparselt.products import head_operators as ops
from sdgp_cusparselt.recording.records import COMPILED, LayerRecord, record_of

#: Logits of a slice: 64 MiB of bf16, and 128 MiB of the float32 that they are made into.
CHUNK = 1 << 25
REDUCTIONS = ("mean", "sum", "none")
_NAME = "linear_cross_entropy"
_INSTEAD = "Use torch.nn.functional.linear_cross_entropy where that is needed."
_NO_TRANSFORM = f"SDGP: {_NAME} is not defined inside transforms of torch.func. {_INSTEAD}"
_NO_BATCHED_GRADIENTS = f"SDGP: {_NAME} takes one gradient at a time, not a batch. {_INSTEAD}"
_NO_DOUBLE_BACKWARD = f"SDGP: {_NAME} has no second derivative. {_INSTEAD}"
_PLAIN = SDGPConfig(prune="none")
_RECORD = LayerRecord(f"sdgp.functional.{_NAME}")


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    config: SDGPConfig | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    chunk: int = CHUNK,
    record: LayerRecord | None = None,
) -> Tensor:
    """Return the cross-entropy of a linear head without its logits in memory.

    logits = input @ weight.T + bias
    lse    = logsumexp(logits)
    loss   = lse - (1 - s) * logits[target] - s * mean(logits) + z * lse**2
    grad   = of the logits, made, pruned if so configured, and multiplied a slice at a time

    Args:
        input: [..., in_features] float.
        weight: [vocabulary, in_features]: that of the head, also if tied to an embedding.
        target: [...] int64, the class of each token.
        bias: [vocabulary] or None.
        config: how the gradient of the logits is pruned; None prunes nothing, the default: a head
            is where pruning is least tried.
        label_smoothing: s, in 0..1.
        ignore_index: target of tokens that do not count.
        reduction: "mean" over the tokens that count, "sum", or "none".
        z_loss: z, what lse**2 weighs; at least 0.
        chunk: logits that exist at a time, about.
        record: where calls and fallbacks are counted; a shared one if None.

    Returns:
        The loss: [] or, with "none", [...]; float32, or float64 for float64 operands. Sums over the
        vocabulary and over slices are in that dtype.

    Raises:
        TypeError: config is not an SDGPConfig, target not int64, or operands differ in dtype.
        ValueError: shapes that do not fit, an unknown reduction, a number out of its range, a
            config with a schedule or with "rescaled_magnitude" for grad_weight, whose sums run
            over the vocabulary.
        IndexError: a target is no class (on CUDA a device-side assertion, as torch's).
        NotSupportedError: the weight is sharded or of a class that only itself can multiply, or
            as ``linear``.
        SDGPError: in double backward, and inside transforms of torch.func.

    Note:
        Nothing of the vocabulary's size is kept for backward, which computes the logits again: a
        fourth product of the head's size, but no sum of all of grad_weight in float32 and no
        gradient that was made before GradScaler's factor was known. Under autocast operands are
        cast as ``torch.nn.functional.linear`` casts them.

    Source:
        The online softmax of Milakov and Gimelshein (arXiv 1805.02867), over slices.
    """
    config = _PLAIN if config is None else config
    _check_choices(config, label_smoothing, ignore_index, reduction, z_loss, chunk)
    _check_operands(input, weight, target, bias, config)
    token = (_RECORD if record is None else record).token
    if torch.compiler.is_compiling() and not config.telemetry_every:
        token = COMPILED.token
    if torch._C._are_functorch_transforms_active():
        raise SDGPError(_NO_TRANSFORM)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        input.reshape(-1, input.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        reduction,
        (float(label_smoothing), float(z_loss), ignore_index, chunk),
        (config.text, token),
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _check_choices(
    config: SDGPConfig,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    chunk: int,
) -> None:
    check_config(_NAME, config)
    if config.schedule is not None:
        fix = "Pass config.at(step); only layers that convert_ made follow a schedule."
        raise value_error(_NAME, "config", "one without a schedule", config.describe(), fix)
    if config.forward != "dense":
        fix = "A head's weight is not pruned here; export a model with 2:4 weights instead."
        raise value_error(_NAME, "config.forward", '"dense"', repr(config.forward), fix)
    if config.grad_weight == "sparse" and config.grad_weight_prune == "rescaled_magnitude":
        fix = "Its sums run over the vocabulary, which no tile holds. Use mvue."
        rule = "any method but rescaled_magnitude"
        raise value_error(_NAME, "config.grad_weight_prune", rule, "that", fix)
    if reduction not in REDUCTIONS:
        rule = f"one of {', '.join(REDUCTIONS)}"
        raise value_error(_NAME, "reduction", rule, repr(reduction), "Pick one of these.")
    for name, value, high in (("label_smoothing", label_smoothing, 1), ("z_loss", z_loss, None)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise type_error(_NAME, name, "a number", repr(value), "0 is without it.")
        if not 0 <= value <= (torch.inf if high is None else high):
            rule = ">= 0" if high is None else f"in 0..{high}"
            raise value_error(_NAME, name, rule, value, "0 is without it.")
    checked_int(_NAME, "ignore_index", ignore_index)
    if checked_int(_NAME, "chunk", chunk) < 1:
        raise value_error(_NAME, "chunk", "at least 1", chunk, "It counts logits.")


def _check_operands(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, config: SDGPConfig
) -> None:
    if shards.is_sharded(weight) or shards.is_sharded(input):
        fix = "Gather them: weight.full_tensor(), or fully_shard a module that calls it."
        raise NotSupportedError(f"{_NAME}: its operands are sharded. {fix}")
    reason = reason_against(input, weight, config)
    if reason is not None:
        raise NotSupportedError(f"{_NAME}: {reason}. {_INSTEAD}")
    if weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        rule = "[vocabulary, in_features] with the in_features of input"
        got: object = f"{list(weight.shape)} for an input of {list(input.shape)}"
        raise value_error(_NAME, "weight", rule, got, "Pass the weight of the head.")
    if bias is not None and bias.shape != weight.shape[:1]:
        got = list(bias.shape)
        raise value_error(_NAME, "bias", f"[{weight.shape[0]}]", got, "Pass that of the head.")
    if target.shape != input.shape[:-1]:
        rule, got = f"{list(input.shape[:-1])} as input's tokens", list(target.shape)
        fix = "Pass one class a token; probabilities of classes are not taken."
        raise value_error(_NAME, "target", rule, got, fix)
    if target.dtype != torch.int64:
        raise type_error(_NAME, "target", "torch.int64", target.dtype, "Cast it: target.long().")
    if not input.is_floating_point():
        raise type_error(_NAME, "input", "a float tensor", input.dtype, "Cast it.")
    cast = casting.autocast_dtype(input) is not None
    for name, x in (("weight", weight), ("bias", bias)):
        if (
            x is not None
            and x.dtype != input.dtype
            and (not cast or torch.float64 in (x.dtype, input.dtype))
        ):
            raise type_error(_NAME, name, f"{input.dtype} as input", x.dtype, "Cast one of them.")


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        reduction: str,
        objective: tuple[float, float, int, int],
        config: tuple[str, int],
    ) -> Tensor:
        operands = _cast(input, weight, bias)
        ctx.objective, ctx.config = objective, config
        ctx.dtypes = input.dtype, weight.dtype
        kept = target != objective[2]
        count = kept.sum() if reduction == "mean" else None
        losses, lse = _losses((*operands, target), objective)
        ctx.save_for_backward(*operands, target, lse, count)
        if count is not None:
            return losses.sum() / count
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        if not torch.compiler.is_compiling():
            casting.forget()
            check_one_gradient(grad_output, _NO_BATCHED_GRADIENTS)
        with torch.no_grad():
            found = _gradients(ctx, grad_output)
        return once(ctx, grad_output, *found, None, None, None, None, why=_NO_DOUBLE_BACKWARD)


def _cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    dtype = casting.autocast_dtype(input)
    operands = (input, weight, bias)
    if dtype is None:
        return operands
    return tuple(None if x is None else casting.cast(x, dtype) for x in operands)


def _head(operands: tuple[Any, ...], objective: tuple[float, float, int, int]) -> products.Head:
    input, weight, bias, target = operands
    smoothing, z_loss, ignore_index, chunk = objective
    what = products.Objective(smoothing, z_loss, ignore_index)
    return products.Head(input, weight, bias, target, what, chunk)


def _losses(
    operands: tuple[Any, ...], objective: tuple[float, float, int, int]
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor] = ops.head_losses(*operands, *objective)
        return found
    return products.losses(_head(operands, objective))


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return grad_input, grad_weight and grad_bias, where they are needed."""
    *operands, target, lse, count = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    worth = grad_output.to(lse.dtype)
    if count is not None:
        # Where no token counts the loss is 0 / 0, and no gradient depends on it.
        worth = torch.where(count > 0, worth / count, 0.0)
    scale = torch.where(target != ctx.objective[2], worth, 0.0)
    if torch.compiler.is_compiling():
        found: tuple[Tensor | None, ...] = ops.head_gradients(
            *operands, target, lse, scale, *ctx.objective, *needs, ctx.dtypes[1], *ctx.config
        )
    else:
        config, record = SDGPConfig.from_text(ctx.config[0]), record_of(ctx.config[1])
        head = _head((*operands, target), ctx.objective)
        found = products.gradients(head, lse, scale, needs, ctx.dtypes[1], config, record)
    dtypes = ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1]
    wanted = zip(found, needs, dtypes, strict=True)
    return tuple(g.to(dtype) if g is not None and need else None for g, need, dtype in wanted)
