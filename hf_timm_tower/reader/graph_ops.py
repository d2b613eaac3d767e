"""The tensor operations a stored head may use: one table from a name in the file to a function of ours.

The reader of a graph looks names up here and nowhere else, so what is not listed cannot be called. Left out on purpose
is everything that reads or writes files, touches raw storage or pointers, calls back into Python, changes what a tensor
is (``set_``, ``resize_``), or moves values into Python. `OPS` maps a name such as ``"torch.cat"``, ``"Tensor.view"``
or ``"F.linear"`` to the callable; a name that the installed torch lacks is absent from it. Memory is never left
uninitialised: ``torch.empty`` and its kin are recorded as zeros, which is one of the things they may give.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn as nn

# An allow-list of names, by the prefixes under which a file has them.
_OP_NAMES = {
    "Tensor": """
__add__ __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__ __iand__ __idiv__ __ifloordiv__ __imod__ __imul__
__invert__ __ior__ __ipow__ __isub__ __itruediv__ __ixor__ __le__ __lt__ __matmul__ __mod__ __mul__ __ne__ __neg__
__or__ __pow__ __radd__ __rand__ __rdiv__ __reversed__ __rfloordiv__ __rmatmul__ __rmod__ __rmul__ __ror__ __rpow__
__rsub__ __rtruediv__ __rxor__ __setitem__ __sub__ __truediv__ __xor__ abs_ absolute_ acos_ acosh_ add_ addbmm_ addcdiv_
addcmul_ addmm_ addmv_ addr_ asin_ asinh_ atan2_ atan_ atanh_ baddbmm_ bernoulli_ bfloat16 bitwise_and_ bitwise_not_
bitwise_or_ bitwise_xor_ bool byte cauchy_ cdouble ceil_ cfloat char clamp_max_ clamp_min_ clip_ contiguous copy_
copysign_ cos_ cosh_ cumprod_ cumsum_ deg2rad_ digamma_ div_ divide_ double eq_ erf_ erfc_ erfinv_ exp2_ expand
expand_as expm1_ exponential_ fill_ fill_diagonal_ float floor_ floor_divide_ fmod_ frac_ ge_ geometric_ ger gt_ half
index_add_ index_copy_ index_fill_ index_put_ int le_ lerp_ lgamma_ log10_ log1p_ log2_ log_ log_normal_ logical_and_
logical_not_ logical_or_ logit_ long lt_ masked_fill_ masked_scatter_ mul_ multiply_ nan_to_num_ ne_ neg_ negative_
new_full new_ones new_tensor new_zeros normal_ pow_ random_ reciprocal_ remainder_ renorm_ repeat requires_grad_
reshape_as round_ rsqrt_ scatter_ scatter_add_ scatter_reduce_ sgn_ short sign_ sin_ sinc_ sinh_ sqrt_ square_ squeeze_
sub_ subtract_ sum_to_size t_ tan_ to transpose_ tril_ triu_ true_divide_ trunc_ type type_as unfold uniform_ unique
unsqueeze_ view view_as xlogy_ zero_ cpu cuda
""",
    "torch Tensor": """
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr adjoint all amax amin aminmax angle any arccos
arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh baddbmm
bernoulli bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
broadcast_to ceil cholesky_inverse chunk clamp clamp_ clamp_max clamp_min clip clone conj conj_physical copysign
corrcoef cos cosh count_nonzero cov cross cummax cummin cumprod cumsum deg2rad det detach detach_ diag diag_embed
diagflat diagonal diagonal_scatter diff digamma dist div divide dot dsplit eq erf erfc erfinv exp exp_ exp2 expm1 fix
flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frexp gather ge greater greater_equal gt
hardshrink heaviside histc hsplit hypot i0 index_add index_copy index_fill index_put index_reduce index_select inner
inverse isclose isfinite isinf isnan isneginf isposinf isreal kron kthvalue ldexp le lerp less less_equal lgamma log
log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor
logit logsumexp lt masked_fill masked_scatter masked_select matmul matrix_exp matrix_power max maximum mean median min
minimum mm mode moveaxis movedim msort mul multinomial multiply mv mvlgamma nan_to_num nanmean nanmedian nanquantile
nansum narrow ne neg negative nextafter nonzero norm not_equal outer permute pinverse polygamma positive pow prelu prod
quantile rad2deg ravel reciprocal relu relu_ remainder renorm repeat_interleave reshape resolve_conj resolve_neg roll
rot90 round rsqrt scatter scatter_add scatter_reduce select select_scatter sgn sigmoid sigmoid_ sign signbit sin sinc
sinh slice_scatter slogdet softmax sort split split_with_sizes sqrt square squeeze std sub subtract sum svd swapaxes
swapdims t take take_along_dim tan tanh tanh_ tensor_split tile topk trace transpose tril triu true_divide trunc unbind
unflatten unique_consecutive unsqueeze var vdot vsplit where xlogy
""",
    "torch": """
adaptive_avg_pool1d adaptive_max_pool1d affine_grid_generator alpha_dropout atleast_1d atleast_2d atleast_3d avg_pool1d
batch_norm bilinear binary_cross_entropy_with_logits block_diag broadcast_tensors bucketize cartesian_prod cat cdist
celu celu_ chain_matmul channel_shuffle cholesky_solve column_stack combinations complex concat concatenate
constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_embedding_loss
cosine_similarity cumulative_trapezoid dropout dropout_ dstack einsum embedding embedding_bag feature_alpha_dropout
feature_dropout frobenius_norm full_like geqrf grid_sampler grid_sampler_2d group_norm gru gru_cell hinge_embedding_loss
hstack imag instance_norm isin kl_div layer_norm lstm lstm_cell margin_ranking_loss max_pool1d max_pool2d max_pool3d
meshgrid native_group_norm native_layer_norm norm_except_dim nuclear_norm ones_like orgqr ormqr pairwise_distance pdist
pixel_shuffle pixel_unshuffle poisson poisson_nll_loss polar rand_like randint_like randn_like real rms_norm rnn_relu
rnn_relu_cell rnn_tanh rnn_tanh_cell rrelu rsub searchsorted selu stack std_mean tensordot threshold trapezoid trapz
triplet_margin_loss var_mean view_as_complex view_as_real vstack zeros_like _weight_norm arange as_tensor asarray
bartlett_window blackman_window eye full hamming_window hann_window linspace logspace normal ones rand randint randn
randperm scalar_tensor tensor tril_indices triu_indices zeros _standard_gamma _sample_dirichlet binomial
""",
    "F": """
_threshold adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool1d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d
adaptive_max_pool3d_with_indices affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear
binary_cross_entropy binary_cross_entropy_with_logits celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d cosine_embedding_loss cosine_similarity cross_entropy dropout dropout1d dropout2d dropout3d elu elu_
embedding embedding_bag feature_alpha_dropout fold gaussian_nll_loss gelu glu grid_sample group_norm gumbel_softmax
hardshrink hardsigmoid hardswish hardtanh hardtanh_ hinge_embedding_loss huber_loss instance_norm interpolate kl_div
l1_loss layer_norm leaky_relu leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d
margin_ranking_loss max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices max_unpool1d max_unpool2d mish mse_loss multi_head_attention_forward multi_margin_loss
multilabel_margin_loss multilabel_soft_margin_loss nll_loss normalize one_hot pad pairwise_distance pdist
pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 relu_ rms_norm rrelu scaled_dot_product_attention selu
selu_ sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink
threshold threshold_ triplet_margin_loss unfold upsample
""",
    "linalg": """
cond cross det diagonal eigh eigvalsh householder_product inv lu_factor lstsq matmul matrix_rank matrix_exp
matrix_norm matrix_power multi_dot norm pinv qr slogdet solve solve_triangular svd svdvals tensorinv tensorsolve
vander vecdot vector_norm cholesky
""",
    "special": """
digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 log1p log_softmax logit logsumexp multigammaln
ndtr ndtri psi round sinc softmax xlog1py xlogy
""",
    "fft": "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn fftshift ifftshift fftfreq rfftfreq",
}
TENSOR_PROPERTIES = ("T", "mT", "H", "mH", "real", "imag", "data")


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, as momentum encoders write it; only with a tensor of the same shape, dtype and device."""
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        raise ValueError(f"data of shape {list(value.shape)} cannot replace that of a tensor {list(tensor.shape)}")
    tensor.data = value


def _draw_dirichlet(concentration: torch.Tensor) -> torch.Tensor:
    """What `torch.distributions.Dirichlet` and `Beta` draw with, gradient included."""
    return torch.distributions.dirichlet._Dirichlet.apply(concentration)  # type: ignore[no-any-return]


_SPACES: dict[str, Any] = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": nn.functional,
    "linalg": torch.linalg,
    "special": torch.special,
    "fft": torch.fft,
}
OP_NAMES = tuple(
    (prefix, _SPACES[prefix], name)
    for prefixes, names in _OP_NAMES.items()
    for name in names.split()
    for prefix in prefixes.split()
    if hasattr(_SPACES[prefix], name)
)
"""A function's prefix, where torch has it, and its name there, of those that this torch has."""

OPS: dict[str, Callable[..., Any]] = {
    **{f"{prefix}.{name}": getattr(space, name) for prefix, space, name in OP_NAMES},  # names from above, no file
    **{f"Tensor.{name}": attrgetter(name) for name in TENSOR_PROPERTIES},
    "Tensor.set_data_": _set_data,
    "torch.draw_dirichlet": _draw_dirichlet,
}
