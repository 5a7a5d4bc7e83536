"""Training of the embedded editors, of their few-step student and of LESA's predictor.

Part of the repository and not of the wheel: run it from the repository root.

    python -m training.micro.train --help
    python -m training.distil --help
    python -m training.lesa --help
"""
