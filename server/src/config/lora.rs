//! Adapters, from arguments.

use tidemill_engine::LoraConfig;

use crate::{args::LoraArgs, exit::Failure};

/// Room for adapters, if it is wanted.
///
/// # Errors
/// Wrong usage: adapters that nothing makes room for.
pub fn lora_config(args: LoraArgs) -> Result<Option<LoraConfig>, Failure> {
    if !args.enable_lora {
        let unused =
            [("--lora-modules", !args.lora_modules.is_empty()), ("--lora-dir", args.lora_dir.is_some())];
        return match unused.into_iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) => Err(Failure::usage(format_args!("{option} needs --enable-lora"))),
            None => Ok(None),
        };
    }
    if args.lora_modules.is_empty() && args.lora_dir.is_none() {
        return Err(Failure::usage(
            "--enable-lora keeps room for adapters, and none could ever be loaded; name some with --lora-modules, or a folder for \
             them with --lora-dir",
        ));
    }
    if let Some(dir) = args.lora_dir.as_ref().filter(|dir| !dir.is_dir()) {
        return Err(Failure::usage(format_args!("--lora-dir {} is no folder", dir.display())));
    }
    Ok(Some(LoraConfig {
        max_loras: args.max_loras.into(),
        max_lora_rank: args.max_lora_rank.into(),
        max_cpu_loras: args.max_cpu_loras.into(),
        modules: args.lora_modules.into_iter().map(|module| (module.name, module.path)).collect(),
        dir: args.lora_dir,
    }))
}
