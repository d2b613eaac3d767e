"""The feature cache under its earlier name; it is in `hf_timm_tower.training.feature_cache`."""

from .training.feature_cache import CachedFeatures, cache_features, forward_from_cache

__all__ = ["CachedFeatures", "cache_features", "forward_from_cache"]
