//! `--shard`: a part of the work list, known to every machine without asking another.

use crate::batch::work_list::Task;
use anyhow::{Context, Result, bail};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::str::FromStr;

/// Which part is this machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shard {
    /// the one of that number, from 0
    Part { number: usize, of: usize },
    /// what the variables of the queueing system say
    Auto,
}

/// What queueing systems call a task's number, the number of the first task or the variable that
/// holds it, the distance from one to the next, and how many there are.
const SYSTEMS: [(&str, &str, &str, &str); 5] = [
    (
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
        "SLURM_ARRAY_TASK_COUNT",
    ),
    ("JOB_COMPLETION_INDEX", "0", "1", "JOB_COMPLETIONS"),
    (
        "AWS_BATCH_JOB_ARRAY_INDEX",
        "0",
        "1",
        "AWS_BATCH_JOB_ARRAY_SIZE",
    ),
    ("CI_NODE_INDEX", "1", "1", "CI_NODE_TOTAL"),
    (
        "BUILDKITE_PARALLEL_JOB",
        "0",
        "1",
        "BUILDKITE_PARALLEL_JOB_COUNT",
    ),
];

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let parts = text
            .split_once('/')
            .and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
        match parts {
            Some((number, of)) if number < of => Ok(Self::Part { number, of }),
            _ => Err("expected I/N with I from 0 to N-1, or auto".into()),
        }
    }
}

impl Shard {
    /// Its number and how many there are; `variable` looks one up. Errors name the variables that
    /// are missing.
    fn numbers(self, variable: impl Fn(&str) -> Option<String>) -> Result<(usize, usize)> {
        if let Self::Part { number, of } = self {
            return Ok((number, of));
        }
        let Some((index, first, step, count)) = SYSTEMS
            .into_iter()
            .find(|(index, ..)| variable(index).is_some())
        else {
            let known: Vec<&str> = SYSTEMS.iter().map(|(index, ..)| *index).collect();
            bail!(
                "`--shard auto` finds no array task: none of {} is set\n\nhint: `--shard 0/4` is the first of four",
                known.join(", ")
            );
        };
        let number = |name: &str| -> Result<usize> {
            if let Ok(number) = name.parse() {
                return Ok(number);
            }
            let text = variable(name)
                .with_context(|| format!("`--shard auto` finds {index}, but {name} is not set"))?;
            text.trim()
                .parse()
                .with_context(|| format!("{name} is `{text}`, which is not a number"))
        };
        // Slurm leaves the step out where it is 1
        let step = if variable(step).is_none() && step.starts_with("SLURM") {
            1
        } else {
            number(step)?.max(1)
        };
        let (index, first, of) = (number(index)?, number(first)?, number(count)?);
        match index.checked_sub(first).map(|number| number / step) {
            Some(number) if number < of => Ok((number, of)),
            _ => bail!(
                "`--shard auto` finds task {index} of {of}, counted from {first}, which does not exist"
            ),
        }
    }

    /// Leaves only its jobs. Costly ones are dealt out first, each to the part with the least to
    /// do, so that all parts take about as long; where all cost the same, it is every N-th.
    pub fn take(self, tasks: &mut Vec<Task>) -> Result<()> {
        let (number, of) = self.numbers(|name| std::env::var(name).ok())?;
        let owners = deal(&tasks.iter().map(Task::cost).collect::<Vec<_>>(), of);
        let mut owners = owners.into_iter();
        tasks.retain(|_| owners.next() == Some(number));
        Ok(())
    }
}

/// Who does each job.
fn deal(costs: &[u64], parts: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|&job| Reverse(costs[job]));
    let mut least: BinaryHeap<Reverse<(u64, usize)>> =
        (0..parts).map(|part| Reverse((0, part))).collect();
    let mut owners = vec![0; costs.len()];
    for job in order {
        if let Some(Reverse((load, part))) = least.pop() {
            owners[job] = part;
            least.push(Reverse((load + costs[job], part)));
        }
    }
    owners
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn auto(variables: &[(&str, &str)]) -> Result<(usize, usize)> {
        Shard::Auto.numbers(|name| {
            variables
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_string())
        })
    }

    #[test]
    fn queueing_systems_say_which_part_is_ours() {
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "14"),
            ("SLURM_ARRAY_TASK_MIN", "10"),
            ("SLURM_ARRAY_TASK_COUNT", "8"),
        ];
        assert_eq!(auto(&slurm).unwrap(), (4, 8));
        let stepped = [slurm.as_slice(), &[("SLURM_ARRAY_TASK_STEP", "2")]].concat();
        assert_eq!(auto(&stepped).unwrap(), (2, 8));
        assert_eq!(
            auto(&[("JOB_COMPLETION_INDEX", "0"), ("JOB_COMPLETIONS", "3")]).unwrap(),
            (0, 3)
        );
        assert_eq!(
            auto(&[("CI_NODE_INDEX", "1"), ("CI_NODE_TOTAL", "3")]).unwrap(),
            (0, 3)
        );
        for (variables, named) in [
            (&[][..], "SLURM_ARRAY_TASK_ID"),
            (
                &[("JOB_COMPLETION_INDEX", "0")],
                "JOB_COMPLETIONS is not set",
            ),
            (
                &[("JOB_COMPLETION_INDEX", "3"), ("JOB_COMPLETIONS", "3")],
                "task 3 of 3",
            ),
            (
                &[("JOB_COMPLETION_INDEX", "x"), ("JOB_COMPLETIONS", "3")],
                "not a number",
            ),
        ] {
            let said = format!("{:#}", auto(variables).unwrap_err());
            assert!(said.contains(named), "{said}");
        }
    }

    #[test]
    fn parts_are_written_from_zero() {
        assert_eq!("2/3".parse(), Ok(Shard::Part { number: 2, of: 3 }));
        for wrong in ["3/3", "1", "a/b", "-1/3", "1/0", ""] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn equal_jobs_go_round_and_costly_ones_are_shared_out() {
        assert_eq!(deal(&[7; 7], 3), [0, 1, 2, 0, 1, 2, 0]);
        let owners = deal(&[1, 1, 100, 1, 100, 1], 2);
        assert_ne!(owners[2], owners[4]);
        let load = |part| {
            owners
                .iter()
                .zip([1, 1, 100, 1, 100, 1])
                .filter(|(owner, _)| **owner == part)
                .map(|(_, cost)| cost)
                .sum::<i32>()
        };
        assert_eq!((load(0), load(1)), (102, 102));
    }
}
