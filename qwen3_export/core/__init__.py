"""The ground floor: configuration, tensors, packing and files. numpy, ml_dtypes and safetensors only."""
