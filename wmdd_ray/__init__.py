"""Dataset distillation by Wasserstein barycenters (WMDD, ICCV 2025) on Ray."""
