"""The promises of every variant, each as one function of (class, config). No check knows a variant by name.

"Perturbed" means that every trainable tensor was moved off its start: errors that cancel at the start show there.
Tolerances are relative to the largest value of the reference unless the promise is equality of bits.
"""

from typing import Any

from .attaching import check_deepcopy_is_independent, check_detach_is_exact, check_failed_attach_leaves_no_trace, check_stacks
from .calls import check_calls_and_shapes, check_compiles, check_follows_dtype, check_repeats_itself, check_reuses_nothing_stale
from .claims import check_affine, check_contraction, check_isometry, check_rank
from .coefficient import check_coeff_is_continuous, check_coeff_per_sample, check_coeff_zero_is_base, check_starts_at_identity
from .data import check_needs_data
from .declaration import (
    check_config_goes_to_json_and_back,
    check_places_are_exact,
    check_shapes_match_annotations,
    check_specs_are_declarative,
)
from .files import check_load_is_strict, check_pickles, check_save_load_is_exact
from .judging import TOLERANCE, Variant, demand, demand_same, error, perturbed, photograph
from .training import (
    check_base_is_never_written,
    check_checkpointing_is_exact,
    check_decay_spares_identity,
    check_every_tensor_matters,
    check_gradients_flow,
)

CHECKS: tuple[Any, ...] = (
    check_specs_are_declarative,
    check_config_goes_to_json_and_back,
    check_shapes_match_annotations,
    check_places_are_exact,
    check_repeats_itself,
    check_starts_at_identity,
    check_coeff_zero_is_base,
    check_coeff_is_continuous,
    check_coeff_per_sample,
    check_every_tensor_matters,
    check_gradients_flow,
    check_base_is_never_written,
    check_decay_spares_identity,
    check_checkpointing_is_exact,
    check_detach_is_exact,
    check_failed_attach_leaves_no_trace,
    check_deepcopy_is_independent,
    check_stacks,
    check_save_load_is_exact,
    check_load_is_strict,
    check_pickles,
    check_reuses_nothing_stale,
    check_compiles,
    check_follows_dtype,
    check_calls_and_shapes,
    check_needs_data,
    check_affine,
    check_rank,
    check_contraction,
    check_isometry,
)
"""In the order in which they run: what breaks first explains what breaks later."""

__all__ = ["CHECKS", "TOLERANCE", "Variant", "demand", "demand_same", "error", "perturbed", "photograph"]
