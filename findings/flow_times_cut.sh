#!/usr/bin/env bash
# diffusers 0.42.1, UniPC and DPM++ with flow sigmas: the times they tell are cut to whole numbers, their noise is not.
#
# Guess: with `use_flow_sigmas` a solver's timesteps are 1000 times its sigmas, as FlowMatchEulerDiscreteScheduler's are.
# Seen: the fraction is cut off, 947 for a noise level of 0.94743: the denoiser is told another time than it is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
schedulers = {
    "Euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": UniPCMultistepScheduler(**flow),
    "DPM++": DPMSolverMultistepScheduler(**flow),
}
apart = {}
for name, scheduler in schedulers.items():
    scheduler.set_timesteps(7)
    apart[name] = float((scheduler.timesteps - 1000 * scheduler.sigmas[:-1]).abs().max())
print(f"diffusers {diffusers.__version__}: times differ from 1000 sigma by up to {apart}")
assert apart["Euler"] < 1e-3
assert apart["UniPC"] > 0.5 and apart["DPM++"] > 0.5, "the times are exact now"
PY
