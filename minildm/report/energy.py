"""What a run took from the grid: energy = time x power, carbon = energy x intensity of the electricity.

Power is that of the device alone, at its limit (of all devices, where several processes trained together), so the
energy is an upper bound for the device and leaves out the rest of the machine and its cooling. Check: 40 hours of a
V100 at 300 W, at 0.3 kg of CO2 per kWh, are 12 kWh and 3.6 kg.
"""

from dataclasses import dataclass

from minildm.report.read_run import Missing, is_number
from minildm.settings import Settings, setting


@dataclass(frozen=True)
class EnergySettings(Settings):
    power: float | None = setting(
        None, "watts of a device that trained (default: a GPU's power limit, where the run recorded it)", above=0
    )
    intensity: float | None = setting(None, "kg of CO2 per kWh of your electricity, for the carbon line", at_least=0)


def energy(seconds, watts):
    """kWh."""
    return seconds * watts / 3.6e6


def energy_line(run, settings):
    """Energy and carbon of a run in words; Missing without time or power."""
    if not run.summary:
        return Missing(run.summary.reason)
    watts = settings.power
    if watts is None:
        machines = [session.get("machine") for session in run.sessions]
        limits = [machine.get("power_limit_watts") if isinstance(machine, dict) else None for machine in machines]
        watts = limits[-1] if limits and all(map(is_number, limits)) else None
    if watts is None:
        return Missing("the power of the device is not known; give --power WATTS")
    watts *= _processes(run.sessions[-1]) if run.sessions else 1
    kwh = energy(run.summary["seconds"], watts)
    text = f"{kwh:.3g} kWh ({run.summary['seconds'] / 3600:.3g} h at {watts:g} W)"
    if settings.intensity is None:
        return f"{text}; carbon missing: give --intensity KG_PER_KWH"
    return f"{text}, {kwh * settings.intensity:.3g} kg CO2 at {settings.intensity:g} kg/kWh"


def _processes(session):
    """How many processes trained together, each with a device of its own."""
    n = session.get("processes", 1)
    return n if isinstance(n, int) else 1
