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
import torch.nn.functional as functional
from torch.distributions.dirichlet import _Dirichlet

_TORCH = """
abs absolute acos acosh adaptive_avg_pool1d adaptive_max_pool1d add addbmm addcdiv addcmul addmm addmv addr adjoint
affine_grid_generator all alpha_dropout amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan arctan2
arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d baddbmm
batch_norm bernoulli bilinear binary_cross_entropy_with_logits bincount bitwise_and bitwise_left_shift bitwise_not
bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat
cdist ceil celu celu_ chain_matmul channel_shuffle cholesky_inverse cholesky_solve chunk clamp clamp_ clamp_max
clamp_min clip clone column_stack combinations complex concat concatenate conj conj_physical constant_pad_nd conv1d
conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copysign corrcoef cos cosh cosine_embedding_loss
cosine_similarity count_nonzero cov cross cummax cummin cumprod cumsum cumulative_trapezoid deg2rad det detach detach_
diag diag_embed diagflat diagonal diagonal_scatter diff digamma dist div divide dot dropout dropout_ dsplit dstack
einsum embedding embedding_bag eq erf erfc erfinv exp exp_ exp2 expm1 feature_alpha_dropout feature_dropout fix
flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac frexp frobenius_norm full_like gather ge
geqrf greater greater_equal grid_sampler grid_sampler_2d group_norm gru gru_cell gt hardshrink heaviside
hinge_embedding_loss histc hsplit hstack hypot i0 imag index_add index_copy index_fill index_put index_reduce
index_select inner instance_norm inverse isclose isfinite isin isinf isnan isneginf isposinf isreal kl_div kron
kthvalue layer_norm ldexp le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2
logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logsumexp lstm lstm_cell lt
margin_ranking_loss masked_fill masked_scatter masked_select matmul matrix_exp matrix_power max max_pool1d max_pool2d
max_pool3d maximum mean median meshgrid min minimum mm mode moveaxis movedim msort mul multinomial multiply mv
mvlgamma nan_to_num nanmean nanmedian nanquantile nansum narrow native_group_norm native_layer_norm ne neg negative
nextafter nonzero norm norm_except_dim not_equal nuclear_norm ones_like orgqr ormqr outer pairwise_distance pdist
permute pinverse pixel_shuffle pixel_unshuffle poisson poisson_nll_loss polar polygamma positive pow prelu prod
quantile rad2deg rand_like randint_like randn_like ravel real reciprocal relu relu_ remainder renorm repeat_interleave
reshape resolve_conj resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 round rrelu rsqrt
rsub scatter scatter_add scatter_reduce searchsorted select select_scatter selu sgn sigmoid sigmoid_ sign signbit sin
sinc sinh slice_scatter slogdet softmax sort split split_with_sizes sqrt square squeeze stack std std_mean sub
subtract sum svd swapaxes swapdims t take take_along_dim tan tanh tanh_ tensor_split tensordot threshold tile topk
trace transpose trapezoid trapz tril triplet_margin_loss triu true_divide trunc unbind unflatten unique_consecutive
unsqueeze var var_mean vdot view_as_complex view_as_real vsplit vstack where xlogy zeros_like _weight_norm arange
as_tensor asarray bartlett_window blackman_window eye full hamming_window hann_window linspace logspace normal ones
rand randint randn randperm scalar_tensor tensor tril_indices triu_indices zeros _standard_gamma _sample_dirichlet
binomial
"""

_TENSOR = """
__add__ __and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__ __iand__ __idiv__ __ifloordiv__ __imod__
__imul__ __invert__ __ior__ __ipow__ __isub__ __itruediv__ __ixor__ __le__ __lt__ __matmul__ __mod__ __mul__ __ne__
__neg__ __or__ __pow__ __radd__ __rand__ __rdiv__ __reversed__ __rfloordiv__ __rmatmul__ __rmod__ __rmul__ __ror__
__rpow__ __rsub__ __rtruediv__ __rxor__ __setitem__ __sub__ __truediv__ __xor__ abs abs_ absolute absolute_ acos acos_
acosh acosh_ add add_ addbmm addbmm_ addcdiv addcdiv_ addcmul addcmul_ addmm addmm_ addmv addmv_ addr addr_ adjoint
all amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere
asin asin_ asinh asinh_ atan atan2 atan2_ atan_ atanh atanh_ baddbmm baddbmm_ bernoulli bernoulli_ bfloat16 bincount
bitwise_and bitwise_and_ bitwise_left_shift bitwise_not bitwise_not_ bitwise_or bitwise_or_ bitwise_right_shift
bitwise_xor bitwise_xor_ bmm bool broadcast_to byte cauchy_ cdouble ceil ceil_ cfloat char cholesky_inverse chunk
clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip clip_ clone conj conj_physical contiguous copy_ copysign
copysign_ corrcoef cos cos_ cosh cosh_ count_nonzero cov cross cummax cummin cumprod cumprod_ cumsum cumsum_ deg2rad
deg2rad_ det detach detach_ diag diag_embed diagflat diagonal diagonal_scatter diff digamma digamma_ dist div div_
divide divide_ dot double dsplit eq eq_ erf erf_ erfc erfc_ erfinv erfinv_ exp exp2 exp2_ exp_ expand expand_as expm1
expm1_ exponential_ fill_ fill_diagonal_ fix flatten flip fliplr flipud float float_power floor floor_ floor_divide
floor_divide_ fmax fmin fmod fmod_ frac frac_ frexp gather ge ge_ geometric_ ger greater greater_equal gt gt_ half
hardshrink heaviside histc hsplit hypot i0 index_add index_add_ index_copy index_copy_ index_fill index_fill_
index_put index_put_ index_reduce index_select inner int inverse isclose isfinite isinf isnan isneginf isposinf isreal
kron kthvalue ldexp le le_ lerp lerp_ less less_equal lgamma lgamma_ log log10 log10_ log1p log1p_ log2 log2_ log_
log_normal_ log_softmax logaddexp logaddexp2 logcumsumexp logdet logical_and logical_and_ logical_not logical_not_
logical_or logical_or_ logical_xor logit logit_ logsumexp long lt lt_ masked_fill masked_fill_ masked_scatter
masked_scatter_ masked_select matmul matrix_exp matrix_power max maximum mean median min minimum mm mode moveaxis
movedim msort mul mul_ multinomial multiply multiply_ mv mvlgamma nan_to_num nan_to_num_ nanmean nanmedian nanquantile
nansum narrow ne ne_ neg neg_ negative negative_ new_full new_ones new_tensor new_zeros nextafter nonzero norm normal_
not_equal outer permute pinverse polygamma positive pow pow_ prelu prod quantile rad2deg random_ ravel reciprocal
reciprocal_ relu relu_ remainder remainder_ renorm renorm_ repeat repeat_interleave requires_grad_ reshape reshape_as
resolve_conj resolve_neg roll rot90 round round_ rsqrt rsqrt_ scatter scatter_ scatter_add scatter_add_ scatter_reduce
scatter_reduce_ select select_scatter sgn sgn_ short sigmoid sigmoid_ sign sign_ signbit sin sin_ sinc sinc_ sinh
sinh_ slice_scatter slogdet softmax sort split split_with_sizes sqrt sqrt_ square square_ squeeze squeeze_ std sub
sub_ subtract subtract_ sum sum_to_size svd swapaxes swapdims t t_ take take_along_dim tan tan_ tanh tanh_
tensor_split tile to topk trace transpose transpose_ tril tril_ triu triu_ true_divide true_divide_ trunc trunc_ type
type_as unbind unflatten unfold uniform_ unique unique_consecutive unsqueeze unsqueeze_ var vdot view view_as vsplit
where xlogy xlogy_ zero_ cpu cuda
"""

_FUNCTIONAL = """
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
"""

_LINALG = """
cond cross det diagonal eigh eigvalsh householder_product inv lu_factor lstsq matmul matrix_rank matrix_exp
matrix_norm matrix_power multi_dot norm pinv qr slogdet solve solve_triangular svd svdvals tensorinv tensorsolve
vander vecdot vector_norm cholesky
"""

_SPECIAL = (
    "digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammaln i0 i0e i1 log1p log_softmax logit logsumexp "
    "multigammaln ndtr ndtri psi round sinc softmax xlog1py xlogy"
)

_FFT = "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn fftshift ifftshift fftfreq rfftfreq"

TENSOR_PROPERTIES = ("T", "mT", "H", "mH", "real", "imag", "data")


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, as momentum encoders write it; only with a tensor of the same shape, dtype and device."""
    if (tensor.shape, tensor.dtype, tensor.device) != (value.shape, value.dtype, value.device):
        raise ValueError(f"data of shape {list(value.shape)} cannot replace that of a tensor {list(tensor.shape)}")
    tensor.data = value


def _draw_dirichlet(concentration: torch.Tensor) -> torch.Tensor:
    """What `torch.distributions.Dirichlet` and `Beta` draw with, gradient included."""
    return _Dirichlet.apply(concentration)  # type: ignore[no-any-return]


def _build_table() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for prefix, space, listed in OP_SPACES:
        for name in listed.split():
            function = getattr(space, name, None)  # a name from the lists above, never from a file
            if function is not None:
                table[f"{prefix}.{name}"] = function
    for name in TENSOR_PROPERTIES:
        table[f"Tensor.{name}"] = attrgetter(name)
    table["Tensor.set_data_"] = _set_data
    table["torch.draw_dirichlet"] = _draw_dirichlet
    return table


OP_SPACES: tuple[tuple[str, Any, str], ...] = (
    ("torch", torch, _TORCH),
    ("Tensor", torch.Tensor, _TENSOR),
    ("F", functional, _FUNCTIONAL),
    ("linalg", torch.linalg, _LINALG),
    ("special", torch.special, _SPECIAL),
    ("fft", torch.fft, _FFT),
)
OPS = _build_table()
