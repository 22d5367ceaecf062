# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training in phases. Where things are:

- the run and its order: `trainer`, `phases`, `run_output`
- what is refused before it starts: `accepted`, `checks`, `rehearsal`, `labels`
- phases that train the model: `model_phase` (their trainer), `model_step`, `heads_objective`, `heads_objectives`
- phases on stored exits: `stored_exits`, `stored_phases`, `policy_phase`, `objectives`, `rewards`, `hardness`
- evaluation: `exit_evaluation` (of any phase), `early_exit_trainer` (operating points), `trained_card`
- what differs between rows and tokens: `items`, `token_evaluation`
- checkpoints and the hub: `checkpoints`, `publishing`; what trains, and how fast: `parameters`
- fits without a trainer: `estimators`, `least_squares`
"""
