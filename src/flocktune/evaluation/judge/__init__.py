"""A judge model's verdicts on pairs of answers: what it is asked, how it is reached, what its scores come to."""
