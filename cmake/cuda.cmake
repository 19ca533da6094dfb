# The CUDA core, _cuda: needs nvcc and no driver. DCMERGE_CUDA=AUTO builds it where a trial compile works.
#
# Architectures: CMAKE_CUDA_ARCHITECTURES or the environment's CUDAARCHS ("90", or "80-real;90"). By default Turing to
# Blackwell as machine code, and the newest as PTX, which later ones translate when they load it; up to Hopper where nvcc
# is older than 12.8.

# The environment wins over what an earlier configuration left in the cache, as for DCMERGE_CUDA.

set(nvcc "$ENV{CUDACXX}")
if(NOT nvcc)
  find_program(nvcc nvcc PATHS ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  if(nvcc)
    set(ENV{CUDACXX} "${nvcc}")
  endif()
endif()

if(DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}" CACHE STRING "CUDA architectures" FORCE)
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(architectures "75-real;80-real;90-real;100-real;120")
  if(nvcc)
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE release ERROR_QUIET)
    if(release MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_LESS 12.8)
      set(architectures "75-real;80-real;90")
    endif()
  endif()
  set(ENV{CUDAARCHS} "${architectures}")
  set(CMAKE_CUDA_ARCHITECTURES "${architectures}")
endif()

include(CheckLanguage)
if(DCMERGE_CUDA STREQUAL AUTO)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # an earlier configuration may have remembered that there was none
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(STATUS "DCMERGE_CUDA=AUTO: no nvcc that works was found, so CUDA tensors will run on plain torch")
    return()
  endif()
endif()
enable_language(CUDA)
message(STATUS "DCMERGE_CUDA=${DCMERGE_CUDA}: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

set(cuda_kernels csrc/cuda/device.cu csrc/cuda/elect.cu csrc/cuda/newton_schulz.cu csrc/cuda/panel.cu
  csrc/cuda/philox.cu csrc/cuda/project.cu csrc/cuda/select.cu csrc/cuda/small_svd.cu csrc/cuda/smooth.cu)
# Bits that other backends return as well: no contraction. (project names its fused operations.)
set_source_files_properties(csrc/cuda/elect.cu csrc/cuda/philox.cu csrc/cuda/project.cu csrc/cuda/select.cu
  PROPERTIES COMPILE_OPTIONS "-fmad=false")

pybind11_add_module(_cuda csrc/bind_cuda.cpp ${cuda_kernels})
dcmerge_options(_cuda)
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra,-Wshadow>
  $<$<AND:$<BOOL:${DCMERGE_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings
    "SHELL:-Xptxas -warn-spills,-warn-lmem-usage,-Werror" -Xcompiler=-Werror>)
set_target_properties(_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
  CUDA_SEPARABLE_COMPILATION OFF INTERPROCEDURAL_OPTIMIZATION OFF)
install(TARGETS _cuda LIBRARY DESTINATION dcmerge_ext)
