"""What is learned from: one file an objective, found by its name, which is the key of its weight in a configuration.

    loss(model, batch, output) -> Tensor | None      # one number, lower is better; None: this batch asks nothing of it

model is a `worldmodel.model.WorldModel`, batch and output are its input and what it gave (`Batch` and `Output` there).
"""
