"""Error bounds, executed: of sketches, of norms, of subspaces, of codes, of gradients, and of descent.

Each is a function that returns the bound as a number; docs/theory proves them and names the tests that run them.
"""

from loract.bounds.descent import (
    captured_share,
    carried_mean_bound,
    carried_variance_bound,
    progress,
    progress_of_cosine,
    progress_unbiased,
    stale_share,
    stationarity,
    stationarity_unbiased,
)
from loract.bounds.gradients import (
    AttentionBound,
    accumulated_bound,
    attention_backward_bound,
    contraction_bound,
    contraction_mean,
    norm_backward_bound,
    propagated_bound,
)
from loract.bounds.posterior import posterior_error, posterior_floor, posterior_interval
from loract.bounds.rates import EqualBytes, decay_gain, equal_bytes, rate_distortion, water_filling
from loract.bounds.sampling import (
    SketchBound,
    coherence,
    failure_probability,
    gaussian_bound,
    missed_probability,
    numerical_rank,
    sampled_bound,
    sampled_floor,
    sketch_bound,
)
from loract.bounds.subspaces import largest_angle, misaligned_bound, rotation_bound, tracking_bound, warm_bound

__all__ = [
    "AttentionBound",
    "EqualBytes",
    "SketchBound",
    "accumulated_bound",
    "attention_backward_bound",
    "captured_share",
    "carried_mean_bound",
    "carried_variance_bound",
    "coherence",
    "contraction_bound",
    "contraction_mean",
    "decay_gain",
    "equal_bytes",
    "failure_probability",
    "gaussian_bound",
    "largest_angle",
    "misaligned_bound",
    "missed_probability",
    "norm_backward_bound",
    "numerical_rank",
    "posterior_error",
    "posterior_floor",
    "posterior_interval",
    "progress",
    "progress_of_cosine",
    "progress_unbiased",
    "propagated_bound",
    "rate_distortion",
    "rotation_bound",
    "sampled_bound",
    "sampled_floor",
    "sketch_bound",
    "stale_share",
    "stationarity",
    "stationarity_unbiased",
    "tracking_bound",
    "warm_bound",
    "water_filling",
]
