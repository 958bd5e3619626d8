//! From the engine's terms to the wire's and back: nothing may be lost on the way.
