"""Values every layer shares: errors, tensor and part specs, samplers' tables, the bundle's manifest. No framework."""
