"""How well a trained policy does: errors on recorded demonstrations, success in the simulator."""
