"""What a GPU makes of this library, in stages that each leave their results (``gpu.sh``)."""
