"""What two editors and the unedited model cost, made by hand."""

from modules.speed import Measured

ROWS = [
    Measured("incomes", 100, False, 0.5, 0.02, 0.01, 2**20, 3 * 2**20, 0.9, 0.8),
    Measured("icl", 100, False, 2.0, 0.04, 0.02, 2**25, 2**26, 0.5, 0.25),
    Measured("unedited", 100, False, 0.001, 0.02, 0.005, 0, 0, 0.1, 0.1),
    Measured("incomes", 10000, True, 60.0, 0.03, 0.015, 100 * 2**20, 2**30),
    Measured("icl", 10000, True, error="icl: no room"),
]
