"""`softcache export` and `predict`: a student as ONNX, torch.export and safetensors files, each checked.

May import everything below the commands, and stages.student, whose runs it loads. Begin with `command.py`.
"""
