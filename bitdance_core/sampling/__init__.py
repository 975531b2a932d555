"""From a request to bits: settings, plan, canvas, flow, and the loop over patches."""
