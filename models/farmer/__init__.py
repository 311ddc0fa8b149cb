"""FARMER: invertible autoregressive flow and autoregressive transformer over pixels."""
