"""The dry run as a command."""
from trainers.cli import TrainingCLI
class Parsed(TrainingCLI):
    def instantiate_trainer(self, **kwargs): return None
def parsed(args): return Parsed(args)
