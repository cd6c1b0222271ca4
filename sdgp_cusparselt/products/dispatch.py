"""Run a product by the call that was prepared for its like; prepare it where there is none."""

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from sdgp_cusparselt.backends.base import ConvGeometry, method_of
from sdgp_cusparselt.config.choices import SDGPConfig
from sdgp_cusparselt.config.patterns import STOCHASTIC
from sdgp_cusparselt.devices import is_capturing
from sdgp_cusparselt.errors import CusparseLtError, EquivalenceError, PlanStateError
from sdgp_cusparselt.products import announce, prepared
from sdgp_cusparselt.products.checks import fault, weight_fault
from sdgp_cusparselt.products.operands import (
    LinearGradInput,
    LinearGradWeight,
    OfWeight,
    Operands,
    conv_layer_keys,
    linear_layer_keys,
)
from sdgp_cusparselt.products.prepared import Key, PreparedCall
from sdgp_cusparselt.products.sparse import SparseProduct
from sdgp_cusparselt.products.weight_product import WeightProduct
from sdgp_cusparselt.recording.records import LayerRecord
from sdgp_cusparselt.recording.spans import sample_gradient, sampling, span
from sdgp_cusparselt.tuning import recorder

#: What ends a sparse product that runs: the product is computed plainly in the same call.
FAILURES = (CusparseLtError, torch.OutOfMemoryError)


def run(
    operands: Operands, config: SDGPConfig, record: LayerRecord, *, unwatched: bool = False
) -> Tensor:
    """Compute a product the best way that is allowed, and count it.

    Args:
        operands: of the product.
        config: how to prune, and what is allowed.
        record: of the layer.
        unwatched: whether nothing is to be sampled or checked, whatever config says.

    Returns:
        The product.

    Raises:
        NotSupportedError: it cannot go the wanted way and ``on_unsupported`` is "raise".
        EquivalenceError: a sparse product failed its check and ``on_unsupported`` is "raise".
    """
    key = (operands.key(), config.text)
    call = prepared.calls.single.get(key)
    if call is None or call.uses < 1 or record.broken:
        call = prepared.prepare(key, operands, config, record)
    if (call.watched or recorder.ACTIVE) and not unwatched:
        return _watched(call, operands, config, record)
    try:
        product = call.run(operands)
    except PlanStateError:  # the plan was evicted
        prepared.drop(key)
    except FAILURES as error:
        if call.sparse is None:
            raise
        prepared.bar(key, error)
    else:
        call.count(record)
        return product
    return run(operands, config, record, unwatched=True)


def run_both(
    first: LinearGradInput, second: LinearGradWeight, config: SDGPConfig, record: LayerRecord
) -> tuple[Tensor, Tensor]:
    """Compute both products of a linear layer, from one read of the gradient if both run sparse.

    Args:
        first: operands of grad_input.
        second: operands of grad_weight, from the same gradient.
        config: how to prune for each.
        record: of the layer.

    Raises:
        NotSupportedError, EquivalenceError: see ``run``.
    """
    key = (first.key(), second.key(), config.text)
    pair = prepared.calls.both.get(key)
    if pair is None:
        pair = prepared.prepare_both(key, first, second, config)
    if pair is not None and not record.broken and not recorder.ACTIVE:
        try:
            products = pair(first, second)
        except PlanStateError:
            prepared.drop(key)
        except FAILURES as error:
            prepared.bar(key, error)
        else:
            record.calls["grad_input", "sparse"] += 1
            record.calls["grad_weight", "sparse"] += 1
            return products
    return run(first, config, record), run(second, config, record)


def linear_is_plain(
    input: Tensor, weight: Tensor, dtype: torch.dtype, config: SDGPConfig, record: LayerRecord
) -> bool:
    """Whether all that a linear layer prunes is known to run plain, and count it if so.

    A layer's forward asks; on yes torch's own linear and its backward are all there is to run.
    Reasons that may pass are looked at again after some calls: the answer is no then.

    Args:
        input: [..., in_features], before autocast.
        weight: [out_features, in_features], before autocast.
        dtype: in which the products run.
        config: how to prune.
        record: of the layer.
    """
    return _all_plain(linear_layer_keys(input, weight, dtype), config, record)


def conv2d_is_plain(
    input: Tensor,
    weight: Tensor,
    conv: ConvGeometry,
    dtype: torch.dtype,
    config: SDGPConfig,
    record: LayerRecord,
) -> bool:
    """Whether all that a convolution prunes is known to run plain; see ``linear_is_plain``.

    Args:
        input: [N, in_channels, H, W], before autocast.
        weight: [out_channels, in_channels / groups, kH, kW], before autocast.
        conv: stride, padding, dilation, groups.
        dtype: in which the products run.
        config: how to prune.
        record: of the layer.
    """
    return _all_plain(conv_layer_keys(input, weight, conv, dtype), config, record)


def forget() -> None:
    """Forget every prepared call, in every thread, and what was announced."""
    prepared.forget()
    announce.forget()


def _all_plain(keys: tuple[Key, Key], config: SDGPConfig, record: LayerRecord) -> bool:
    if record.broken or recorder.ACTIVE:
        return False
    wanted = keys if config.grad_weight == "sparse" else keys[:1]
    found = [prepared.plain_call((*key, config.text)) for key in wanted]
    known = [call for call in found if call is not None and not call.watched]
    if len(known) < len(wanted):
        return False
    for call in known:
        call.count(record)
    return True


def _watched(
    call: PreparedCall, operands: Operands, config: SDGPConfig, record: LayerRecord
) -> Tensor:
    """Compute a product whose shape is recorded, or that may be due for a check or a sample."""
    if call.asked is not None:
        gemm, method, transpose, rival = call.asked
        recorder.note(gemm, method=method, transpose=transpose, rival=rival)
    product, samples, due = operands.product, record.samples, config.check_every
    device, holds = operands.activations.device, True
    if due and call.sparse is not None and record.calls[call.counted] % due == 0:
        holds = _holds(call.sparse, operands, config, record)
    if isinstance(operands, OfWeight):  # no gradient is pruned, so none has an error
        return run(operands, config, record, unwatched=True)
    if not holds or not samples.due(product, config.telemetry_every, device):
        return run(operands, config, record, unwatched=True)
    plain = call.way == "plain"
    if not plain:
        draws = samples.draws if method_of(product, config) in STOCHASTIC else 1
        pruned = partial(operands.pruned, config)
        sample_gradient(samples, product, operands.grad_output, pruned, draws=draws)
    whole, parts = sampling(samples, product), ("total", "dense") if plain else ("total",)
    with whole, ExitStack() as stack:  # the other ways time their own parts
        for part in parts:
            stack.enter_context(span(part, device))
        return run(operands, config, record, unwatched=True)


def _holds(
    sparse: SparseProduct | WeightProduct,
    operands: Operands,
    config: SDGPConfig,
    record: LayerRecord,
) -> bool:
    """Check a sparse product against the dense one; where it fails, bar the layer from it.

    Raises:
        EquivalenceError: it failed, and going another way is forbidden.
    """
    if is_capturing(operands.activations.device):
        return True
    if isinstance(sparse, SparseProduct):
        assert not isinstance(operands, OfWeight)  # whose line is another one
        found = fault(sparse, operands)
    else:
        assert isinstance(operands, OfWeight)
        found = weight_fault(sparse, operands)
    if found is None:
        return True
    reason = f"it failed a check against dense: {found}"
    record.broken[operands.product] = reason
    if config.on_unsupported == "raise":
        raise EquivalenceError(f"{record.name}: {operands.product} is not used: {reason}")
    return False
