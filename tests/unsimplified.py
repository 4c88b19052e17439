"""What stands in the place of onnxsim's process, whose start is most of what an export of a small network waits for."""

from __future__ import annotations


class Unsimplified:
    """Gives the model back as it is: networks of the tests are simple already."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, model):
        self.model = model

    def result(self):
        return self.model
