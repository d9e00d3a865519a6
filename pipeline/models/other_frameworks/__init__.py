"""Teachers that are no networks of PyTorch: functions, estimators, models in ONNX, targets that were made elsewhere.

May import what `pipeline.models` may, and the modules of it beside this folder. Begin with `file_network.py`.
"""
