# Which architectures the CUDA kernels are compiled for, where nobody has said so: those of the GPUs that this machine
# sees; where it sees none, or one that this nvcc does not know, the lowest of every major family from sm_75 on, whose
# code runs on the rest of the family, and PTX of the newest for what comes after.
function(choose_cuda_architectures nvcc result)
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE listed)
  string(REGEX MATCHALL "compute_[0-9]+" known "${listed}")
  list(TRANSFORM known REPLACE "compute_" "")
  list(FILTER known EXCLUDE REGEX "^([1-6][0-9]|7[0-4])$")
  list(SORT known COMPARE NATURAL)

  # A driver that is ill answers late or never.
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  TIMEOUT 10 RESULT_VARIABLE failed OUTPUT_VARIABLE seen ERROR_QUIET)
  if(failed STREQUAL "0" AND seen MATCHES "^[ \n]*([0-9]+[.][0-9][ \n]*)+$")
    string(REGEX MATCHALL "[0-9]+[.][0-9]" seen "${seen}")
    list(TRANSFORM seen REPLACE "[.]" "")
    list(REMOVE_DUPLICATES seen)
    list(SORT seen COMPARE NATURAL)
    set(unknown ${seen})
    list(REMOVE_ITEM unknown ${known})
    if(NOT unknown)
      list(TRANSFORM seen APPEND "-real")
      set(${result} ${seen} PARENT_SCOPE)
      return()
    endif()
  endif()

  set(families "")
  foreach(arch IN LISTS known)
    string(REGEX REPLACE "[0-9]$" "" family ${arch})
    if(NOT family IN_LIST families)
      list(APPEND families ${family})
      list(APPEND lowest ${arch})
    endif()
  endforeach()
  list(POP_BACK lowest newest)
  list(TRANSFORM lowest APPEND "-real")
  set(${result} ${lowest} ${newest} PARENT_SCOPE)
endfunction()
