"""Policies on robots: the control loop with its limits and watchdog, and the policy server with its clients."""
